"""What a sharding backend gives to the projector: this rank's shards as flat views, and one reduction.

It never asks which method runs. Shapes: L layers, K statistics, N local elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.aliases import Aliases
from digrap_scale.types import ShardSpec, ShardView

STEP = "step"  # in an optimizer's state: how many steps; everything else there has the parameter's shape

# What wrappers put into parameter names, none of which a checkpoint knows.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrapped_name(name: str) -> str:
    """A parameter's name in the unwrapped model (without the marks of compile, checkpoint and FSDP wrappers)."""
    for mark in _WRAPPERS:
        name = name.replace(mark, "")
    return name


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, number of its group) of every parameter that ``optimizer`` trains, in the model's order; tied ones once.

    Raises:
        ConfigError: the optimizer holds a trainable tensor that is no parameter of the model, or none at all.
    """
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"] if p.requires_grad}
    found = []
    for name, parameter in model.named_parameters():
        group = group_of.pop(id(parameter), None)
        if group is not None:
            found.append((unwrapped_name(name), parameter, group))
    if group_of:
        shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) in group_of]
        raise ConfigError(
            f"the optimizer trains {len(shapes)} tensors that are no parameters of the model (shapes {shapes[:3]}): "
            "build the optimizer after wrapping the model, and pass the same model to attach()"
        )
    if not found:
        raise ConfigError("the optimizer trains no parameter of the model: nothing to attach to")
    return found


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Optimizers that step hooks cannot serve.

    Raises:
        ConfigError: LBFGS (and subclasses), or ``differentiable=True``.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer: LBFGS takes new gradients within one step(), which no hook sees, and its inner products are those of "
            "one rank's shards; use AdamW, Adam or SGD"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ConfigError(
            "optimizer: differentiable=True is not supported (the projection changes gradients in place, outside autograd); "
            "set differentiable=False"
        )


def closure_first(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """A step pre hook: evaluate ``step(closure)``'s closure before the hooks that read gradients (Lightning passes one).

    ``args`` begins with the optimizer itself, as torch's hooks are called. What the optimizer is then given only
    returns the loss again.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    return args[:1], {**kwargs, "closure": lambda: loss}


class Backend:
    """Plain tensors in one process, and the base of the others.

    Attributes:
        name: the config's word for it.
        specs: one a layer, in an order that is the same on all ranks.
        hooked: the torch optimizers whose step hooks drive the projector.
    """

    name = "single"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._trained = trained_parameters(model, optimizer)
        self._trained_ids = {id(parameter) for _, parameter, _ in self._trained}
        self.hooked: list[Optimizer] = [optimizer]
        self.specs: list[ShardSpec] = [self.spec(name, parameter) for name, parameter, _ in self._trained]
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._dropped: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._aliases = Aliases(optimizer)

    def spec(self, name: str, parameter: nn.Parameter) -> ShardSpec:
        """Which elements of ``parameter`` this rank holds."""
        return ShardSpec(name, tuple(parameter.shape), 0, parameter.numel())

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, a gradient or an optimizer state tensor: the same object each time."""
        return tensor

    def weights(self) -> list[torch.Tensor]:
        """[N] flat weights of every layer, aliasing what the optimizer steps."""
        return [
            self._flat_weight(spec, parameter)
            for spec, (_, parameter, _) in zip(self.specs, self._trained, strict=True)
        ]

    def unscale_(self) -> None:
        """Undo a GradScaler's factor here, where a fused optimizer would have undone it inside its step."""
        for optimizer in self.hooked:
            scale = getattr(optimizer, "grad_scale", None)
            if scale is None:
                continue
            for _, parameter, _ in self._trained:
                if parameter.grad is not None:
                    self.local(parameter.grad).div_(scale)
            optimizer.grad_scale = None  # type: ignore[attr-defined]

    def views(self, layers: Sequence[int] | None = None) -> list[ShardView]:
        """The shards of ``layers`` (all by default) with their gradients; reference and previous are not filled."""
        self._copied = []
        views = []
        # Once a group, not once a layer: a rate may be a tensor on the device.
        lr_of = [float(group["lr"]) for group in self.hooked[0].param_groups]
        for layer in range(len(self.specs)) if layers is None else layers:
            spec, (_, parameter, group) = self.specs[layer], self._trained[layer]
            weight = self._aliases.flat("weight", layer, self.local(parameter))
            if weight is None:
                weight = self._flat_weight(spec, parameter)
            grad = None if parameter.grad is None else self._flat_grad(self.local(parameter.grad))
            views.append(ShardView(spec, weight, grad, lr=lr_of[group]))
        return views

    def adam_moments(self, layers: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        """Of each layer, Adam's moments m and v ([N]) and its step count (a one-element tensor), or None before its
        first step."""
        state = self.hooked[0].state
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = []
        for layer in layers:
            of_layer = state.get(self._trained[layer][1])
            if not of_layer:
                found.append(None)
                continue
            first, second = self.local(of_layer["exp_avg"]), self.local(of_layer["exp_avg_sq"])
            found.append(
                (self._flat_state("first", layer, first), self._flat_state("second", layer, second), of_layer[STEP])
            )
        return found

    def _flat_state(self, what: str, layer: int, local: torch.Tensor) -> torch.Tensor:
        flat = self._aliases.flat(what, layer, local)
        return local.reshape(-1) if flat is None else flat  # other strides: a copy, for this step

    def state_holder(self, layer: int) -> tuple[torch.Tensor, slice]:
        """The tensor under which the optimizer keeps a layer's state, and which of its elements (flattened) are the layer's."""
        return self._trained[layer][1], slice(None)

    def optimizer_state(self, layer: int) -> dict[str, torch.Tensor]:
        """Flat [N] tensors that alias the optimizer's state of a layer, and ``step``, a one-element tensor; empty before the
        first step."""
        holder, part = self.state_holder(layer)
        state = self.hooked[0].state.get(holder) or {}
        return {
            key: value if key == STEP else self.local(value).view(-1)[part]
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    def copies(self, spec: ShardSpec) -> tuple[int, int]:
        """Of the ranks that hold the same part of a layer: which this one is, and how many there are."""
        return 0, 1

    def frozen(self, name: str, parameter: nn.Parameter) -> tuple[ShardSpec, torch.Tensor]:
        """This rank's part of a parameter that does not train, [N] flat."""
        spec = self.spec(name, parameter)
        return spec, self._flat_weight(spec, parameter)

    def weights_changed(self) -> None:
        """Bring what the model computes with up to date, after ``weights()`` were written to. Collective."""

    def group(self, layer: int) -> dict[str, Any]:
        """The optimizer's settings for a layer, as they are now (loading an optimizer's state replaces the dicts)."""
        group: dict[str, Any] = self.hooked[0].param_groups[self._trained[layer][2]]
        return group

    def stepped(self) -> Sequence[torch.Tensor]:
        """The tensors that the optimizer step under way changes, of those that are known here."""
        return [parameter for _, parameter, _ in self._trained]

    @property
    def shard_ranks(self) -> int:
        """How many ranks a copy of the weights is spread over."""
        return 1

    def stepping(self) -> Sequence[int]:
        """The layers that the optimizer step under way will change (all of them, but for ZeRO's groups and sub-groups)."""
        return range(len(self.specs))

    def first_of_step(self) -> bool:
        """Whether the optimizer step under way is the first of a training step (ZeRO takes one per group or sub-group)."""
        return True

    def reduce_(self, stats_LK: torch.Tensor, layers: Sequence[int]) -> None:
        """Sum the statistics of ``layers``, a row each, over the ranks that hold different shards, in place: one all-reduce,
        or none for replicas."""

    def everywhere(self, condition: bool) -> bool:
        """Whether it holds on every rank that trains a part or a copy of this model. Collective."""
        broken = torch.tensor([0.0 if condition else 1.0], device=self.weights()[0].device)
        for group in self.process_groups():
            all_reduce_(broken, group)
        return not broken.item()

    def process_groups(self) -> Sequence[dist.ProcessGroup | None]:
        """The process groups that together reach every such rank; None is the default one."""
        return ()

    def each_rank(self, stats_LK: torch.Tensor) -> torch.Tensor:
        """The statistics of every rank that holds different shards, [R, L, K]: one all-gather, or none for replicas."""
        return stats_LK.unsqueeze(0)

    def gather(self, layer: int, local: torch.Tensor) -> torch.Tensor:
        """The full tensor, on every rank, whose [N] parts (of layer ``layer``) the ranks hold. Collective if sharded."""
        return local.view(self.specs[layer].shape)

    def write_back(self) -> None:
        """Bring changes of gradients that had to be copied back to where the optimizer reads them."""
        for original, copy in self._copied:
            original.copy_(copy.view(original.shape))
        self._copied = []

    def drop_gradients(self, layers: Sequence[int] | None = None) -> None:
        """Make the optimizer leave weights and state of ``layers`` (all that it steps by default) alone in the step under
        way: torch's optimizers skip ``None``."""
        for layer in range(len(self.specs)) if layers is None else layers:
            self._drop(self._trained[layer][1])

    def _drop(self, stepped: torch.Tensor) -> None:
        self._dropped.append((stepped, stepped.grad))
        stepped.grad = None

    def together(self, layers: Collection[int]) -> tuple[int, int] | None:
        """A layer of ``layers`` and another one that the optimizer steps as one tensor with it; None: there are none."""
        return None

    def check_optimizer(self) -> None:
        """Raises: ConfigError: the optimizer steps a parameter that it did not train when this was made: it would escape
        projection, clipping and skipped steps."""
        for group in self.hooked[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in self._trained_ids:
                    raise ConfigError(
                        f"the optimizer steps a parameter of shape {tuple(parameter.shape)} that it did not train when "
                        "attach() was called; call detach(), and attach() again, after adding or unfreezing parameters"
                    )

    def close(self) -> None:
        """Let go of the optimizer."""
        self._aliases.close()

    def restart_optimizer_(self) -> None:
        """Put the optimizer's state back to where it began: moments and counts of steps are 0."""
        for optimizer in self.hooked:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
                    elif key == STEP:
                        state[key] = 0

    def finish_step(self) -> None:
        """Called after the optimizer's step: dropped gradients are there again, for whoever looks at them."""
        for stepped, grad in reversed(self._dropped):  # the first time that one was dropped counts
            stepped.grad = grad
        self._dropped = []

    def watch_gradients(self, there: Callable[[int], None]) -> list[Any]:
        """Call ``there(layer)`` whenever backward has finished a layer's gradient, reduced over ranks where that is the
        framework's work. Returns handles with ``remove()``. Layers of which it cannot be told are left out.

        Raises:
            ConfigError: this backend can tell it of no layer.
        """
        return [
            parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: there(layer))
            for layer, (_, parameter, _) in enumerate(self._trained)
            if not self.specs[layer].replicated  # a module left unsharded: its gradient is averaged by the user, later
        ]

    def stamp(self, layer: int) -> Hashable:
        """Changes when the layer's gradient or weight is written to; None without a gradient.

        Tensors' version counters are what autograd itself tells writes by. Of a DTensor's gradient only its own counts here:
        for its local tensor see ``buffer_writes``.
        """
        parameter = self._trained[layer][1]
        grad = parameter.grad
        if grad is None:
            return None
        local, weight = self.local(grad), self.local(parameter)
        return local.data_ptr(), grad._version, parameter._version, weight._version

    def buffer_writes(self, layer: int) -> tuple[int, int]:
        """The memory that holds the layer's local gradient, and how many writes it counted so far.

        FSDP2's gradients of a whole group are views of one buffer, which counts writes to any of them: only the last of its
        layers in backward sees the count that must still stand in the step.
        """
        grad = self._trained[layer][1].grad
        assert grad is not None
        local = self.local(grad)
        return local.untyped_storage().data_ptr(), local._version

    def grad_norm_before_clipping(self) -> float | None:
        """The gradient norm as an engine measured it before clipping, or None where the hook sees it unclipped."""
        return None

    def nonfinite_layers(self) -> list[str]:
        """Names of layers whose gradient is not finite, for a step that the engine skipped without calling the optimizer."""
        return []

    def _flat_weight(self, spec: ShardSpec, parameter: nn.Parameter) -> torch.Tensor:
        local = self.local(parameter)
        if not local.is_contiguous():
            raise ConfigError(
                f"{spec.name}: its memory is not contiguous (strides {tuple(local.stride())} for shape "
                f"{tuple(local.shape)}); call .contiguous() on the weights before attach()"
            )
        return local.detach().view(-1)

    def _flat_grad(self, local: torch.Tensor) -> torch.Tensor:
        if local.is_contiguous():
            return local.view(-1)
        copy = local.contiguous().view(-1)
        self._copied.append((local, copy))
        return copy


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum over ``group``, in place; a CPU tensor (offloaded shards) goes by the accelerator where the group has no other way."""
    if tensor.device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        accelerator = torch.accelerator.current_accelerator()
        moved = tensor.to(accelerator)
        dist.all_reduce(moved, group=group)
        tensor.copy_(moved)
    else:
        dist.all_reduce(tensor, group=group)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's tensor, [R, ...], in rank order; as ``all_reduce_``, by the accelerator where there is no other way."""
    sent = tensor
    if tensor.device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        sent = tensor.to(torch.accelerator.current_accelerator())
    gathered = sent.new_empty((dist.get_world_size(group), *sent.shape))
    dist.all_gather(list(gathered.unbind()), sent.contiguous(), group=group)
    return gathered


def gather_intervals(spec: ShardSpec, local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Put flat intervals of ``spec`` together: every rank of ``group`` writes its own into zeros, and all are summed."""
    full = torch.zeros(math.prod(spec.shape), dtype=local.dtype, device=local.device)
    full[spec.start : spec.stop] = local
    if not spec.replicated:
        all_reduce_(full, group)
    return full.view(spec.shape)


def nonfinite_names(named: Iterable[tuple[str, torch.Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in named if tensor is not None and not bool(torch.isfinite(tensor).all())]
