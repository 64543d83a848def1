"""PyTorch FSDP2 (``fully_shard``): parameters are DTensors sharded on dim 0, uneven and empty shards included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import Backend, all_gather, all_reduce_, gather_intervals, unwrapped_name
from digrap_scale.sharding.engine import Engine, MakeOptimizer
from digrap_scale.sharding.materialize import fill_, local_numel_before, materialize
from digrap_scale.types import ShardSpec, Slices


class FSDP2Backend(Backend):
    """Statistics are summed over the mesh dimension that shards; replicas (HSDP's other dimension) reduce nothing.

    Replicas agree in every bit of ω without a collective of their own: the all-reduce over replicas gives all of them
    the same gradient, the same kernels on the same shard give the same statistics, and the all-reduce over the shards
    adds them up in an order that depends on places in the group alone. The assumption is that replicas run on the same
    kind of processor and of links (NCCL chooses its order by them), as it is for DDP with ``clip_grad_norm_``. To drop
    it, one could reduce over the whole mesh with all replicas but the first counting as zeros: no collective more, but
    one that crosses the slow links.

    Raises:
        ConfigError: a parameter's placement is no plain ``Shard(0)`` (tensor parallelism, other dims), parameters
            live on different meshes, or on several devices (CPU offload beside a plain tensor on the accelerator).
    """

    name = "fsdp2"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._group: dist.ProcessGroup | None = None
        self._mesh: object = None
        self._axis = 0
        self._model = model
        super().__init__(model, optimizer)
        if self._group is None:
            raise ConfigError("fsdp2: no trained parameter is sharded; call fully_shard on the model before attach()")
        home = self.weights()[0].device
        for spec, weight in zip(self.specs, self.weights(), strict=True):
            if weight.device != home:
                raise ConfigError(
                    f"{spec.name}: lives on {weight.device}, {self.specs[0].name} on {home}; with CPU offload every trained "
                    "parameter must be sharded: freeze it (fully_shard takes no 0-d one), or do not offload"
                )

    def spec(self, name: str, parameter: nn.Parameter) -> ShardSpec:
        if not isinstance(parameter, DTensor):
            # A module that was left unsharded: the same elements on every rank, to be counted once.
            return ShardSpec(name, tuple(parameter.shape), 0, parameter.numel(), replicated=True)
        shard_axis = self._shard_axis(name, parameter)
        mesh = parameter.device_mesh
        if self._group is None:
            self._group, self._mesh, self._axis = mesh.get_group(shard_axis), mesh, shard_axis
        elif mesh != self._mesh:
            raise ConfigError(
                f"{name}: lives on mesh {mesh}, others on {self._mesh}; shard the whole model on one mesh"
            )
        # torch.chunk's rule, which Shard documents: rows are cut in runs of ceil(rows / ranks), the last ones short or empty.
        rows = parameter.shape[0]
        run = math.ceil(rows / mesh.size(shard_axis))
        first = min(mesh.get_local_rank(shard_axis) * run, rows)
        row_elements = parameter.numel() // rows if rows else 0
        local_elements = parameter.to_local().numel()
        expected = (min(first + run, rows) - first) * row_elements
        if local_elements != expected:
            raise ConfigError(
                f"{name}: this rank holds {local_elements} elements where Shard(0) over {mesh.size(shard_axis)} ranks "
                f"gives {expected}; strided or padded placements are not supported"
            )
        return ShardSpec(name, tuple(parameter.shape), first * row_elements, first * row_elements + local_elements)

    @staticmethod
    def _shard_axis(name: str, parameter: DTensor) -> int:
        axes = [axis for axis, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
        plain = (
            len(axes) == 1
            and type(parameter.placements[axes[0]]) is Shard
            and parameter.placements[axes[0]].is_shard(0)
        )
        if not plain:
            raise ConfigError(
                f"{name}: placement {tuple(parameter.placements)} is not supported; expected one Shard(0), "
                "with any number of Replicate (fully_shard without tensor parallelism)"
            )
        return axes[0]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return _local(tensor)

    def copies(self, spec: ShardSpec) -> tuple[int, int]:
        if spec.replicated:
            return dist.get_rank(), dist.get_world_size()
        assert isinstance(self._mesh, DeviceMesh)
        number, count = 0, 1
        for axis in range(self._mesh.ndim):
            if axis != self._axis:
                number = number * self._mesh.size(axis) + self._mesh.get_local_rank(axis)
                count *= self._mesh.size(axis)
        return number, count

    def watch_gradients(self, there: Callable[[int], None]) -> list[Any]:
        for name, parameter, _ in self._trained:
            if isinstance(parameter, DTensor) and parameter.to_local().device.type != parameter.device_mesh.device_type:
                raise ConfigError(
                    f"statistics during backward: {name} is offloaded, and its gradient is still on its way to the CPU "
                    "when backward tells of it; set training.statistics: step"
                )
        return super().watch_gradients(there)

    def gather(self, layer: int, local: torch.Tensor) -> torch.Tensor:
        return gather_intervals(self.specs[layer], local, self._group)

    def process_groups(self) -> Sequence[dist.ProcessGroup | None]:
        assert isinstance(self._mesh, DeviceMesh)
        return [self._mesh.get_group(axis) for axis in range(self._mesh.ndim)]

    @property
    def shard_ranks(self) -> int:
        return dist.get_world_size(self._group)

    def weights_changed(self) -> None:
        for module in self._model.modules():  # what a forward has gathered and kept is out of date
            if isinstance(module, FSDPModule):
                module.reshard()

    def each_rank(self, stats_LK: torch.Tensor) -> torch.Tensor:
        return all_gather(stats_LK, self._group)

    def reduce_(self, stats_LK: torch.Tensor, layers: Sequence[int]) -> None:
        assert self._group is not None
        if dist.get_rank(self._group) != 0:
            for row, layer in enumerate(layers):
                if self.specs[layer].replicated:
                    stats_LK[row] = 0
        all_reduce_(stats_LK, self._group)


class FSDP2Engine(Engine):
    """``fully_shard`` on every repeated block and on the root.

    Raises:
        ConfigError: ``sharding.wrap`` names a class that the model does not have, or nothing tells which blocks to wrap; a
            weight is tied across blocks; ``sharding.replicas`` does not divide the number of processes.
    """

    lockstep = True

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        sharding = self.config.sharding
        mesh = self._mesh()
        narrow = sharding.mixed_precision == "bfloat16" or self.config.model.dtype != "float32"
        policy = MixedPrecisionPolicy(
            # Gradients are summed over ranks in float32: bfloat16 sums lose what many ranks add.
            param_dtype=torch.bfloat16 if sharding.mixed_precision == "bfloat16" else None,
            reduce_dtype=torch.float32 if narrow else None,
        )
        materialize(model, self.slices, self.device, only_scalars=True)
        offload = OffloadPolicy()
        if sharding.offload == "cpu":
            offload = CPUOffloadPolicy(pin_memory=self.device.type != "cpu")  # pinning needs an accelerator
        # fully_shard refuses 0-d parameters (CLIP's logit_scale): they stay whole on every rank.
        self._scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        blocks = blocks_to_wrap(model, sharding.wrap)
        refuse_split_ties(model, blocks)
        for module in [*blocks, model]:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=sharding.reshard_after_forward,
                ignored_params=set(self._scalars),
            )
        if hasattr(model, "generate"):
            # PEFT's calls the model inside, past the root's own hooks.
            register_fsdp_forward_method(model, "generate")
        # Offloaded shards stay in host memory; what fully_shard does not shard computes where it lies.
        fill_shards(model, self.slices, torch.device("cpu") if sharding.offload == "cpu" else self.device)
        for whole in [*self._scalars, *model.buffers()]:
            whole.data = whole.data.to(self.device)
        self.model = model
        self.optimizer = make_optimizer(model)
        _separate_plain_tensors(self.optimizer)

    def _mesh(self) -> DeviceMesh:
        """One dimension of shards, or replicas × shards: neighbouring ranks (one host) share a copy of the model."""
        replicas = self.config.sharding.replicas
        if self.world_size % replicas:
            raise ConfigError(
                f"sharding.replicas: expected a divisor of the number of processes ({self.world_size}), found {replicas}"
            )
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        shape = (replicas, self.world_size // replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def step(self) -> None:
        grads = [parameter.grad for parameter in self._scalars if parameter.grad is not None]
        if grads:
            means = torch.stack(grads)
            dist.all_reduce(means)
            for grad, mean in zip(grads, (means / self.world_size).unbind(), strict=True):
                grad.copy_(mean)
        super().step()

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Sums over the shards in every micro-batch, over the replicas in the last one.

        To leave out the first sum as well (``set_requires_gradient_sync``) would keep a whole model's float32 gradients
        on every rank, 4 bytes a parameter, which is what sharding is there to avoid; it also overlaps with backward. The
        second one is the slow one (it crosses hosts), and what waits for it is a shard. Every block has a gradient in
        the last micro-batch, or in none: our tasks use the whole model every time.
        """
        if self.config.sharding.replicas > 1:
            self.model.set_requires_all_reduce(last)
        return nullcontext()

    def inference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def fill_shards(model: nn.Module, slices: Slices | None, device: torch.device) -> None:
    """Give memory on ``device`` to the shards that ``fully_shard`` left on the meta device, and values: each rank its own.

    Everything else (a new head's shards, buffers) keeps its values.
    """
    hollow = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    if not hollow:
        return
    real = {
        name: _local(tensor).detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name not in hollow
    }
    model.to_empty(device=device)  # the only way that fully_shard's own references follow; it empties all
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in real:
                _local(tensor).copy_(real.pop(name))
                continue
            assert slices is not None, f"{name}: on the meta device, and nothing to read it from"
            assert isinstance(tensor, DTensor)
            axis = FSDP2Backend._shard_axis(name, tensor)
            mesh = tensor.device_mesh
            before = local_numel_before(tensor.shape[0], tensor.numel(), mesh.size(axis), mesh.get_local_rank(axis))
            fill_(tensor.to_local(), slices, unwrapped_name(name), before)


def is_sharded_by_itself(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module: its weights are whole within its own forward alone."""
    return isinstance(module, FSDPModule)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # Not the public to_local(): it goes through autograd and costs ten times as much, for each of thousands of tensors in
    # each step. tests/sharding holds the attribute against it.
    local: torch.Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


def _separate_plain_tensors(optimizer: Optimizer) -> None:
    """Give plain tensors parameter groups of their own: fused and foreach kernels do not take them beside DTensors."""
    for group in list(optimizer.param_groups):
        plain = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if 0 < len(plain) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            optimizer.add_param_group({**group, "params": plain})


def refuse_split_ties(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """``fully_shard`` unties what it finds in two of its modules.

    Raises:
        ConfigError: one parameter in two of ``blocks``, or in one of them and outside.
    """
    wrapped = {id(block) for block in blocks}
    first: dict[int, tuple[str, int]] = {}
    named = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parents = name.split(".")[:-1]
        prefixes = (".".join(parents[:depth]) for depth in range(len(parents), 0, -1))
        owner = next((id(named[prefix]) for prefix in prefixes if id(named[prefix]) in wrapped), 0)
        known, known_owner = first.setdefault(id(parameter), (name, owner))
        if owner != known_owner:
            raise ConfigError(
                f"sharding.wrap: {known} and {name} are one tied weight in two modules that are sharded by themselves; wrap a "
                "class that holds both, or neither, or untie them in the model's config"
            )


def blocks_to_wrap(model: nn.Module, class_names: list[str]) -> list[nn.Module]:
    """The modules that are sharded one by one: those of the named classes, or of the model's own ``_no_split_modules``.

    Raises:
        ConfigError: a named class that the model does not have; no names and none that the model knows.
    """
    wanted = set(class_names) or {
        name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or [])
    }
    # Innermost first: fully_shard leaves to an outer module what an inner one has not taken.
    blocks = [module for module in model.modules() if type(module).__name__ in wanted and module is not model][::-1]
    present = sorted({type(module).__name__ for module in model.modules()})
    missing = sorted(set(class_names) - set(present))
    if missing:
        raise ConfigError(
            f"sharding.wrap: the model has no module of class {missing[0]!r}; it has {', '.join(present)}"
        )
    if not blocks:
        raise ConfigError(
            f"sharding.wrap: {type(model).__name__} does not say which blocks to shard; name their class here (it has "
            f"{', '.join(present)})"
        )
    return blocks
