"""The state of torch's Adam and AdamW, for a step taken in the optimizer's place: made and counted as torch does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from digrap_scale.sharding.base import STEP, Backend
from digrap_scale.types import AdamSettings, AdamState


def begin_adam_step(backend: Backend, layers: Sequence[int]) -> list[AdamState | None]:
    """Count the step under way for every parameter that has a gradient (its state is made if this is its first), and
    return the state of ``layers``: None for those without a gradient so far.

    The state's layout is torch's own (``step``, ``exp_avg``, ``exp_avg_sq`` in ``optimizer.state``), so that checkpoints
    and a later plain step know no difference; tests/distributed/test_fused.py holds it against torch's.
    """
    counted: dict[torch.device, list[torch.Tensor]] = {}
    for optimizer in backend.hooked:
        known = {id(tensor) for tensor in backend.stepped()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or id(parameter) not in known:
                    continue
                state = optimizer.state[parameter]
                add_state(state, group, parameter, ("step", "exp_avg", "exp_avg_sq"))
                for key in ("exp_avg", "exp_avg_sq"):
                    # Loaded from weights of other strides: the flat views below must not be copies.
                    if not backend.local(state[key]).is_contiguous():
                        state[key] = state[key].contiguous()
                counted.setdefault(state["step"].device, []).append(state["step"])
    for steps in counted.values():
        torch._foreach_add_(steps, 1)  # as torch's own optimizers count: one launch, not one a parameter
    found = backend.adam_moments(layers)
    counts = iter(step_counts([state[2] for state in found if state is not None]))
    settings: dict[int, AdamSettings] = {}
    states: list[AdamState | None] = []
    for layer, state in zip(layers, found, strict=True):
        if state is None:
            states.append(None)
            continue
        group = backend.group(layer)
        if id(group) not in settings:
            settings[id(group)] = _settings(group)
        states.append(AdamState(state[0], state[1], int(next(counts)), settings[id(group)]))
    return states


def add_state(state: dict[str, Any], group: dict[str, Any], parameter: torch.Tensor, keys: Iterable[str]) -> None:
    """Zeros for those of ``keys`` that an optimizer's state of ``parameter`` lacks, made as torch's optimizers make them."""
    for key in keys:
        if key in state:
            continue
        if key == STEP:
            on_device = bool(group.get("fused") or group.get("capturable"))
            device = parameter.device if on_device else torch.device("cpu")
            state[key] = torch.zeros((), dtype=torch.float32, device=device)
        else:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def step_counts(steps: Sequence[torch.Tensor]) -> list[float]:
    """The numbers in one-element tensors, by one transfer a device: fused optimizers keep them where the weights are."""
    counts = [0.0] * len(steps)
    for device in {step.device for step in steps}:
        here = [i for i, step in enumerate(steps) if step.device == device]
        flat = [step if step.dim() == 0 else step.reshape(()) for step in (steps[i] for i in here)]
        for i, count in zip(here, torch.stack(flat).tolist(), strict=True):
            counts[i] = count
    return counts


def _settings(group: dict[str, Any]) -> AdamSettings:
    beta1, beta2 = group["betas"]
    return AdamSettings(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group.get("decoupled_weight_decay")),
        fused=bool(group.get("fused")),
    )
