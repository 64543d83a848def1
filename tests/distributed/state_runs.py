"""Train some steps on one backend, hand everything over by parameter name, and go on on another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import digrap_scale
from tests.distributed.toy import make_batches, make_theta0, make_toy
from tests.distributed.training_runs import GLOBAL_BATCH, Case, _deepspeed, make_optimizer

OPTIONS = {"strength_lr": 0.05}
METHODS = ("digrap", "digrap_update")
Carried = dict[str, Any]


def train_part(backend: str, method: str, start: int, stop: int, carried: Carried | None = None) -> Carried:
    """Steps [start, stop) from the initial weights or from ``carried``: weights, Adam's state, the projector's."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = make_toy()
    theta0 = make_theta0(model)
    if carried is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in carried["weights"]:
                    parameter.copy_(carried["weights"][name])
    engine: Any = None
    optimizer: Any = None
    if backend.startswith("zero"):
        engine, _ = _deepspeed(model, Case(backend), world_size)
    else:
        if backend == "fsdp2":
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        optimizer = make_optimizer(model)
    projector = digrap_scale.attach(engine or model, optimizer, method=method, reference=theta0, **OPTIONS)
    if carried is not None:
        load_moments(projector, carried["moments"])
        projector.load_state_dict(carried["projector"])
    for x, y in make_batches(stop, GLOBAL_BATCH)[start:]:
        share = GLOBAL_BATCH // world_size
        part = slice(rank * share, (rank + 1) * share)
        loss = cross_entropy((engine or model)(x[part]), y[part])
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    backend_ = projector.backend
    return {
        "weights": {
            spec.name: backend_.gather(layer, weight).clone()
            for layer, (spec, weight) in enumerate(zip(backend_.specs, backend_.weights(), strict=True))
        },
        "moments": save_moments(projector),
        "projector": projector.state_dict(),
        "strength": projector.strength(),
    }


def state_of(projector: digrap_scale.Projector, layer: int) -> dict[str, torch.Tensor]:
    """Adam's state of a layer, as views of this rank's part; filled with zeros where there is none yet."""
    backend = projector.backend
    (optimizer,) = backend.hooked
    if backend.name.startswith("zero"):
        number, offset, _, real = backend._place[layer]
        parameter = backend._flats[number]
    else:
        parameter = backend._trained[layer][1]
    state = optimizer.state[parameter]
    if not state:
        zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        state.update(step=torch.tensor(0.0), **zeros)
    local = {key: backend.local(state[key]).view(-1) for key in ("exp_avg", "exp_avg_sq")}
    if backend.name.startswith("zero"):
        local = {key: flat.narrow(0, offset, real) for key, flat in local.items()}
    return {"step": state["step"], **local}


def save_moments(projector: digrap_scale.Projector) -> dict[str, dict[str, torch.Tensor]]:
    moments = {}
    for layer, spec in enumerate(projector.backend.specs):
        state = state_of(projector, layer)
        moments[spec.name] = {
            "step": state["step"].clone(),
            **{key: projector.backend.gather(layer, state[key]).clone() for key in ("exp_avg", "exp_avg_sq")},
        }
    return moments


def load_moments(projector: digrap_scale.Projector, moments: dict[str, dict[str, torch.Tensor]]) -> None:
    steps = max(state["step"] for state in moments.values())
    for layer, spec in enumerate(projector.backend.specs):
        state = state_of(projector, layer)
        # ZeRO counts steps for a whole group or sub-group, the layers without a gradient included.
        state["step"].fill_(steps if projector.backend.name.startswith("zero") else moments[spec.name]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].copy_(moments[spec.name][key].reshape(-1)[spec.start : spec.stop])


def parts(backend: str, half: int, stop: int, carried: dict[str, Carried]) -> dict[str, dict[str, Carried]]:
    """For every method: the first half, and the second half from what another backend hands over."""
    return {
        method: {
            "first": train_part(backend, method, 0, half),
            "second": train_part(backend, method, half, stop, carried[method]),
        }
        for method in METHODS
    }


def zero_chain(half: int, stop: int, carried: dict[str, Carried]) -> dict[str, dict[str, dict[str, Carried]]]:
    """``parts`` on zero2 from another backend, then on zero1 from zero2, in the same processes."""
    zero2 = parts("zero2", half, stop, carried)
    return {"zero2": zero2, "zero1": parts("zero1", half, stop, {m: zero2[m]["first"] for m in METHODS})}
