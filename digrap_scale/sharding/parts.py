"""What a checkpoint takes of an engine: parts of named tensors, and numbers. Every backend and world size gives, and takes,
the same names and full shapes.

Names: ``model.<parameter>``, ``optimizer.state.<parameter>.<key>``: see docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.errors import CheckpointError
from digrap_scale.sharding.adam import add_state
from digrap_scale.sharding.base import STEP, Backend, unwrapped_name
from digrap_scale.sharding.engine import Engine
from digrap_scale.types import WEIGHTS, ShardSpec, TensorPart, own_interval

STATE = "optimizer.state."


def part_of(backend: Backend, spec: ShardSpec, key: str, tensor: torch.Tensor) -> TensorPart:
    """A layer's part of a tensor of its shape, under ``key``."""
    return TensorPart(key, spec.shape, spec.start, spec.stop, tensor, *backend.copies(spec))


def trained_parts(backend: Backend) -> list[TensorPart]:
    """The weights that the optimizer steps; the tensors alias them."""
    return [
        part_of(backend, spec, WEIGHTS + spec.name, weight)
        for spec, weight in zip(backend.specs, backend.weights(), strict=True)
    ]


def frozen_parts(engine: Engine, backend: Backend) -> list[TensorPart]:
    """The parameters that do not train: of each, the elements that this rank answers for."""
    trained = {spec.name for spec in backend.specs}
    parts = []
    for full_name, parameter in engine.module.named_parameters():
        name = unwrapped_name(full_name)
        if name in trained:
            continue
        spec, local = backend.frozen(name, parameter)
        start, stop = own_interval(spec.start, spec.stop, *backend.copies(spec))
        values = engine.frozen_values(name, start, stop, local[start - spec.start : stop - spec.start])
        parts.append(TensorPart(WEIGHTS + name, spec.shape, start, stop, values))
    return parts


def buffer_parts(engine: Engine) -> list[TensorPart]:
    """The buffers that the model's state has; they are whole on every rank."""
    rank, ranks = _copies_everywhere()
    return [
        TensorPart(WEIGHTS + name, tuple(buffer.shape), 0, buffer.numel(), buffer.reshape(-1), rank, ranks)
        for name, buffer in engine.saved_buffers().items()
    ]


def _copies_everywhere() -> tuple[int, int]:
    """``Backend.copies`` of what every rank holds: which copy this rank's is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def load_buffers(engine: Engine, parts: Iterable[TensorPart]) -> None:
    """Put the values of ``buffer_parts``, filled, into the model."""
    buffers = engine.saved_buffers()
    for part in parts:
        buffer = buffers[part.key.removeprefix(WEIGHTS)]
        buffer.copy_(part.tensor.view(buffer.shape))


def optimizer_parts(backend: Backend) -> list[TensorPart]:
    """The optimizer's state; the tensors alias it, but for the counts of steps."""
    rank, ranks = _copies_everywhere()
    parts = []
    for layer, spec in enumerate(backend.specs):
        for key, tensor in backend.optimizer_state(layer).items():
            name = f"{STATE}{spec.name}.{key}"
            if key == STEP:
                parts.append(TensorPart(name, (), 0, 1, tensor.detach().float().reshape(1), rank, ranks))
            else:
                parts.append(part_of(backend, spec, name, tensor))
    return parts


class OptimizerLoading:
    """Room for a stored optimizer's state: ``parts`` are to be filled, then ``finish`` is called.

    An optimizer that steps several layers as one flat tensor (ZeRO) has one count of steps for them: the largest.

    Args:
        backend: whose optimizer it is.
        stored: the checkpoint's keys.
    """

    def __init__(self, backend: Backend, stored: Collection[str]) -> None:
        self._backend = backend
        (optimizer,) = backend.hooked
        keys_of = {
            layer: [key for key in _state_keys(optimizer) if f"{STATE}{spec.name}.{key}" in stored]
            for layer, spec in enumerate(backend.specs)
        }
        holders = {id(holder): holder for layer in keys_of for holder in [backend.state_holder(layer)[0]]}
        for holder in holders.values():
            optimizer.state.pop(holder, None)
        for layer, keys in keys_of.items():
            if keys:
                holder, _ = backend.state_holder(layer)
                add_state(optimizer.state[holder], backend.group(layer), holder, keys)
        self.parts: list[TensorPart] = []
        self._counts: list[tuple[int, torch.Tensor]] = []
        for layer, spec in enumerate(backend.specs):
            state = backend.optimizer_state(layer) if keys_of[layer] else {}
            for key in keys_of[layer]:
                name = f"{STATE}{spec.name}.{key}"
                if key == STEP:
                    count = torch.zeros(1)
                    self._counts.append((layer, count))
                    self.parts.append(TensorPart(name, (), 0, 1, count))
                else:
                    self.parts.append(part_of(backend, spec, name, state[key]))

    def finish(self) -> None:
        """The counts of steps take effect."""
        for layer, count in self._counts:
            step = self._backend.optimizer_state(layer)[STEP]
            step.fill_(max(float(step), float(count)))


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter, in torch's names."""
    if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
        return (STEP, "exp_avg", "exp_avg_sq")
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",)
    raise CheckpointError(
        f"optimizer: a checkpoint's state of {type(optimizer).__name__} is not known; use adamw, adam, sgd"
    )


def describe_engine(engine: Engine, backend: Backend) -> dict[str, Any]:
    """What ``state.json`` says of weights and optimizer; see docs/checkpoints.md."""
    trained = {spec.name for spec in backend.specs}
    named = [unwrapped_name(name) for name, _ in engine.module.named_parameters()]
    first = {id(parameter): unwrapped_name(name) for name, parameter in engine.module.named_parameters()}
    tied = {
        unwrapped_name(alias): first[id(parameter)]
        for alias, parameter in engine.module.named_parameters(remove_duplicate=False)
        if unwrapped_name(alias) != first[id(parameter)]
    }
    groups: dict[int, dict[str, Any]] = {}
    for layer, spec in enumerate(backend.specs):
        group = backend.group(layer)
        plain: dict[str, Any] = {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str))}
        plain["lr"] = float(group["lr"])
        if "betas" in group:
            plain["betas"] = [float(beta) for beta in group["betas"]]
        groups.setdefault(id(group), {"names": [], **plain})["names"].append(spec.name)
    return {
        "trained": [spec.name for spec in backend.specs],
        "frozen": [name for name in named if name not in trained],
        "buffers": list(engine.saved_buffers()),
        "tied": tied,
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in engine.dtypes().items()},
        "optimizer": {"name": type(backend.hooked[0]).__name__, "groups": list(groups.values())},
    }
