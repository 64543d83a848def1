"""Thirty steps of the toy model on a backend: the code under test, as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import digrap_scale
from tests.distributed.toy import Toy, make_batches, make_theta0, make_toy

STEPS, GLOBAL_BATCH = 30, 12
LR = {"main": 2e-2, "plain": 1e-2}
DECAY = {"main": 1e-2, "plain": 0.0}


@dataclass(frozen=True)
class Case:
    backend: str
    method: str = "digrap"
    accumulation: int = 1
    max_grad_norm: float | None = None
    reference_file: str | None = None
    bfloat16: bool = False
    nan_at: tuple[int, int] | None = None  # (step, rank)
    steps: int = STEPS
    without_reference: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)


def group_of(name: str) -> str:
    return "plain" if "bias" in name or "unused" in name or "gain" in name else "main"


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    groups: dict[str, list[torch.nn.Parameter]] = {"main": [], "plain": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[key], "lr": LR[key], "weight_decay": DECAY[key]} for key in groups], foreach=False
    )


def theta0_of(case: Case, model: Toy) -> dict[str, torch.Tensor]:
    return {name: value for name, value in make_theta0(model).items() if not name.endswith(case.without_reference)}


def train_toy(case: Case) -> dict[str, Any]:
    """Weights, ω, reports and the collectives that the projector used; the same on every rank."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = make_toy()
    theta0 = theta0_of(case, model)
    engine: Any = None
    optimizer: Any = None
    if case.backend == "single":
        optimizer = make_optimizer(model)
        wrapped: Any = model
    elif case.backend == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make_optimizer(model)
    elif case.backend == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if case.bfloat16 else None)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        wrapped = model
        optimizer = make_optimizer(model)
    else:
        engine, wrapped = _deepspeed(model, case, world_size)
    options: dict[str, Any] = dict(case.options)
    if case.reference_file is not None:
        options.update(reference=case.reference_file, not_projected=["^head"])
    else:
        options.update(reference=theta0)
    projector = digrap_scale.attach(
        engine if engine is not None else wrapped,
        optimizer,
        method=case.method,
        max_grad_norm=None if engine is not None and engine.gradient_clipping() > 0 else case.max_grad_norm,
        **options,
    )
    collectives = Collectives(everything=engine is None)
    reports = []
    for step, (x, y) in enumerate(make_batches(case.steps, GLOBAL_BATCH)):
        share = GLOBAL_BATCH // world_size
        x, y = x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]
        micro = share // case.accumulation
        for part in range(case.accumulation):
            last = part == case.accumulation - 1
            xs, ys = x[part * micro : (part + 1) * micro], y[part * micro : (part + 1) * micro]
            if case.nan_at == (step, rank):
                xs = xs * float("nan")
            if engine is None and case.backend == "ddp":
                wrapped.require_backward_grad_sync = last
            if case.bfloat16 and engine is not None:
                xs = xs.bfloat16()
            loss = cross_entropy(wrapped(xs).float(), ys)
            if engine is not None:
                engine.backward(loss)
                with collectives:
                    engine.step()
            else:
                (loss / case.accumulation).backward()
        if engine is None:
            with collectives:
                optimizer.step()
            optimizer.zero_grad()
        elif projector.report.step == step:
            projector.note_engine_skip()
        reports.append(vars(projector.report).copy())
    return {
        "weights": _full_weights(model, engine),
        "strength": projector.strength(),
        "reports": reports,
        "reductions": collectives.seen,
        "state": projector.state_dict(),
    }


def _deepspeed(model: Toy, case: Case, world_size: int) -> tuple[Any, Any]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if case.bfloat16:
        config["bf16"] = {"enabled": True}
    config["zero_optimization"].update(case.zero.get("zero_optimization", {}))
    config.update({key: value for key, value in case.zero.items() if key != "zero_optimization"})
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    return engine, engine


class Collectives:
    """(rows, bytes) of the all-reduces while the optimizer steps; DeepSpeed's own (never [L, K] float64) are left out."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything
        self.seen: list[tuple[int, int]] = []

    def __enter__(self) -> None:
        self._original = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.everything or (tensor.dtype == torch.float64 and tensor.ndim == 2):
                self.seen.append((tensor.shape[0], tensor.numel() * tensor.element_size()))
            return self._original(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def train_all(cases: dict[str, Case]) -> dict[str, Any]:
    """Several runs in the same processes: starting them is what takes the time."""
    return {key: train_toy(case) for key, case in cases.items()}


def _full_weights(model: Toy, engine: Any) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        if engine is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            if not parameter.requires_grad:
                continue
            value = safe_get_full_fp32_param(parameter)
        else:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weights[name] = value.detach().clone()
    return weights
