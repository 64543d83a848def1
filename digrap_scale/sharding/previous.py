"""The weights before the optimizer's last step (for d_{t-1}): kept as one more shard, or computed again from Adam's moments.

Shapes: L layers, N local elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from digrap_scale.errors import CheckpointError
from digrap_scale.sharding.adam import step_counts
from digrap_scale.sharding.base import Backend
from digrap_scale.types import AdamMoments, ShardView

# Of each layer's last step, in this order; `seen` is 0 before the first.
_SETTINGS = ("seen", "lr", "weight_decay", "beta1", "beta2", "eps")


class KeptWeights:
    """One copy of every layer's shard in the weights' dtype; works with any optimizer."""

    name = "stored"

    def __init__(self, backend: Backend, wanted_L: torch.Tensor) -> None:
        self._backend = backend
        self._wanted_L = wanted_L.tolist()
        self._kept_L: list[torch.Tensor | None] = [None] * len(backend.specs)

    def fill(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Give every view its ``previous``."""
        for layer, view in zip(layers, views, strict=True):
            view.previous = self._kept_L[layer]

    def note_step(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Called before the optimizer changes ``layers``."""
        for layer, view in zip(layers, views, strict=True):
            kept = self._kept_L[layer]
            if not self._wanted_L[layer]:
                continue
            if kept is None:
                self._kept_L[layer] = view.weight.clone()
            else:
                kept.copy_(view.weight)

    def forget(self) -> None:
        """Nothing is looked up."""

    def held_tensors(self) -> list[torch.Tensor]:
        """The shards that are kept."""
        return [kept for kept in self._kept_L if kept is not None]

    def state(self, gathered: bool = True, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """By parameter name: the weights before the last step. ``gathered``: full, on the CPU, collective under sharding;
        else this rank's parts. Without ``keep`` this rank takes part in the gathering, and lets each go."""
        found = {}
        for layer, kept in enumerate(self._kept_L):
            if kept is None:
                continue
            whole = self._backend.gather(layer, kept) if gathered else kept
            if keep:
                found[self._backend.specs[layer].name] = whole.cpu() if gathered else whole
        return {"previous": found, "last_step": {}}

    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]], gathered: bool = True) -> None:
        """The inverse of ``state``.

        Raises:
            CheckpointError: a tensor of another shape, or a state saved where the weights were recomputed instead.
        """
        if not state["previous"] and any(float(settings[0]) > 0 for settings in state["last_step"].values()):
            raise CheckpointError(
                "method state: it holds no weights before the last step, they were computed from AdamW's moments; attach "
                "with previous='recomputed' (torch's AdamW or Adam, float32) to continue it"
            )
        specs, weights = self._backend.specs, self._backend.weights()
        for spec in specs:
            full = state["previous"].get(spec.name) if gathered else None
            if full is not None and tuple(full.shape) != spec.shape:
                raise CheckpointError(
                    f"method state: {spec.name}: expected shape {list(spec.shape)}, found {list(full.shape)}"
                )
        for layer, spec in enumerate(specs):
            full = state["previous"].get(spec.name)
            if full is not None and gathered:
                full = full.reshape(-1)[spec.start : spec.stop]
            self._kept_L[layer] = None if full is None else full.to(weights[layer]).clone()


class KeptDirections(KeptWeights):
    """One tensor of the shard's size and dtype that the method writes, zeros at first."""

    def note_step(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Called before the optimizer changes ``layers``: there is room for what the method will keep."""
        for layer, view in zip(layers, views, strict=True):
            if self._wanted_L[layer] and self._kept_L[layer] is None:
                self._kept_L[layer] = torch.zeros_like(view.weight)


class RecomputedWeights:
    """No memory: the last update follows from the optimizer's moments and the settings that it was taken with."""

    name = "recomputed"

    def __init__(self, backend: Backend, wanted_L: torch.Tensor) -> None:
        self._backend = backend
        self._wanted_L = wanted_L.tolist()
        self._settings_LS = torch.zeros(len(backend.specs), len(_SETTINGS), dtype=torch.float64)
        self._moments_L: list[AdamMoments | None] | None = None

    def fill(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Give every view that has been stepped its ``moments``; one that never was gets nothing (⟨g, d_{t-1}⟩ = 0)."""
        if self._moments_L is None:
            self._moments_L = self._moments()
        for layer, view in zip(layers, views, strict=True):
            view.moments = self._moments_L[layer]

    def _moments(self) -> list[AdamMoments | None]:
        """What every layer's last step is computed again with; None for layers that were never stepped or not wanted."""
        rows = self._settings_LS.tolist()
        wanted = [layer for layer, row in enumerate(rows) if self._wanted_L[layer] and row[0] > 0]
        states = self._backend.adam_moments(wanted)
        present = [(layer, state) for layer, state in zip(wanted, states, strict=True) if state is not None]
        moments_L: list[AdamMoments | None] = [None] * len(rows)
        counts = step_counts([state[2] for _, state in present])
        known: dict[tuple[float, ...], tuple[float, float, float, float]] = {}  # most layers are stepped alike
        for (layer, (first, second, _)), count in zip(present, counts, strict=True):
            step = (*rows[layer], count)
            if step not in known:
                known[step] = _factors(*step[1:])
            moments_L[layer] = AdamMoments(first, second, known[step])
        return moments_L

    def note_step(self, views: Sequence[ShardView], layers: Sequence[int]) -> None:
        """Called before the optimizer changes ``layers``: remember what it will do it with."""
        rows, known = [], {}  # once a group, not once a layer
        for layer, view in zip(layers, views, strict=True):
            group, moves = self._backend.group(layer), view.grad is not None
            if (id(group), moves) not in known:
                decay = group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0
                # A layer without a gradient is not stepped: θ_{t-2} = θ_{t-1}, as a step with rate 0 gives.
                lr, decay = (view.lr, decay) if moves else (0.0, 0.0)
                known[id(group), moves] = [1.0, lr, decay, *(float(beta) for beta in group["betas"]), group["eps"]]
            rows.append(known[id(group), moves])
        if rows:
            self._settings_LS[list(layers)] = torch.tensor(rows, dtype=torch.float64)

    def forget(self) -> None:
        """After every step: what was looked up in the optimizer's state may be replaced before the next."""
        self._moments_L = None

    def held_tensors(self) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def state(self, gathered: bool = True, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """By parameter name: the settings of the layer's last step, [6] float64."""
        names = [spec.name for spec in self._backend.specs]
        return {"previous": {}, "last_step": dict(zip(names, self._settings_LS.clone().unbind(), strict=True))}

    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]], gathered: bool = True) -> None:
        """The inverse of ``state``; the optimizer's own state must be restored beside it.

        Raises:
            CheckpointError: the state was saved where the weights were kept instead.
        """
        if state["previous"] and not state["last_step"]:
            raise CheckpointError(
                "method state: it holds the weights before the last step; attach with previous='stored' to continue it"
            )
        self._moments_L = None
        for layer, spec in enumerate(self._backend.specs):
            if spec.name in state["last_step"]:
                self._settings_LS[layer] = state["last_step"][spec.name]


PreviousWeights = KeptWeights | RecomputedWeights


def _factors(
    lr: float, decay: float, beta1: float, beta2: float, eps: float, count: float
) -> tuple[float, float, float, float]:
    """``AdamMoments.factors`` of the ``count``-th step."""
    if lr == 0 or count == 0:  # not moved: θ_{t-2} = θ_{t-1}
        return (1.0, 0.0, 1.0, eps)
    return (1 - lr * decay, lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), eps)


def can_recompute(backend: Backend) -> str | None:
    """Why the optimizer's last update cannot be computed again here, nor its step be taken in its place; None if both
    can: torch's Adam or AdamW on float32 weights."""
    for optimizer in backend.hooked:
        if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
            return f"the optimizer is {type(optimizer).__name__}, expected torch's AdamW or Adam"
        for group in optimizer.param_groups:
            if group.get("amsgrad") or group.get("maximize"):
                return "amsgrad and maximize change the update rule"
    dtypes: set[Any] = {weight.dtype for weight in backend.weights()}
    if dtypes != {torch.float32}:
        return "weights that are not float32 lose the update in rounding"
    return None
