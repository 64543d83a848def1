"""Thirty steps of the toy model on a backend: the code under test, as a user would write it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import digrap_scale
from digrap_scale.method import kernels
from digrap_scale.sharding.previous import KeptWeights, RecomputedWeights
from tests.distributed.fsdp_toy import average_whole, set_sync, shard_toy
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
    float16: bool = False
    cpu_adam: bool = False  # DeepSpeed's own, in place of torch's
    nan_at: tuple[int, int] | None = None  # (step, rank)
    nan_in_hook: bool = False  # ZeRO-3: in the first layer's gradient, after the engine's own check
    nan_layer: str | None = None  # only this layer's gradient, and only where the rank holds a part of it
    steps: int = STEPS
    without_reference: tuple[str, ...] = ()
    large_elements: int | None = None  # layers from this size on are walked one by one, not packed
    options: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)  # arguments of fsdp_toy.shard_toy; sync: see fsdp_toy.set_sync
    samples: int = GLOBAL_BATCH  # a step, over all ranks

    @property
    def probes(self) -> bool:
        return self.method in ("linear_probe", "lp_ft")


def group_of(name: str) -> str:
    return "plain" if "bias" in name or "unused" in name or "gain" in name else "main"


def make_optimizer(model: torch.nn.Module, head_apart: bool = False) -> torch.optim.Optimizer:
    """Two groups, or four: the head's in groups of its own."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {("main", False): [], ("plain", False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (group_of(name), head_apart and name.startswith("head"))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": LR[key], "weight_decay": DECAY[key]} for (key, _), group in groups.items()],
        foreach=False,
    )


def theta0_of(case: Case, model: Toy) -> dict[str, torch.Tensor]:
    return {name: value for name, value in make_theta0(model).items() if not name.endswith(case.without_reference)}


@contextmanager
def large_layers(elements: int | None) -> Iterator[None]:
    """Layers of ``elements`` and more count as large, as they do from 65,536 on by default."""
    before = kernels.LARGE_ELEMENTS
    kernels.LARGE_ELEMENTS = before if elements is None else elements
    try:
        yield
    finally:
        kernels.LARGE_ELEMENTS = before


def train_toy(case: Case) -> dict[str, Any]:
    """See ``_train_toy``; with large layers as the case says."""
    with large_layers(case.large_elements):
        return _train_toy(case)


def _train_toy(case: Case) -> dict[str, Any]:
    """Weights, ω, reports and the collectives that the projector used; the same on every rank."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = make_toy()
    theta0 = theta0_of(case, model)
    engine: Any = None
    optimizer: Any = None
    if case.backend == "single":
        optimizer = make_optimizer(model, case.probes)
        wrapped: Any = model
    elif case.backend == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make_optimizer(model, case.probes)
    elif case.backend == "fsdp2":
        shard_toy(model, bfloat16=case.bfloat16, **{key: v for key, v in case.fsdp.items() if key != "sync"})
        wrapped = model
        optimizer = make_optimizer(model, case.probes)
    else:
        engine, wrapped = _deepspeed(model, case, world_size)
    poison = Poison(case, rank, model, engine)
    options: dict[str, Any] = dict(case.options)
    if case.large_elements is not None:
        options.setdefault("kernels", "eager")  # which alone tell large layers from small ones
    if case.probes:
        pass  # no reference
    elif case.reference_file is not None:
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
    changed: list[str] = []
    measured_early = 0
    for step, (x, y) in enumerate(make_batches(case.steps, case.samples)):
        share = case.samples // world_size
        x, y = x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]
        micro = share // case.accumulation
        for part in range(case.accumulation):
            last = part == case.accumulation - 1
            xs, ys = x[part * micro : (part + 1) * micro], y[part * micro : (part + 1) * micro]
            if case.nan_at == (step, rank) and case.nan_layer is None and not case.nan_in_hook:
                xs = xs * float("nan")
            poison.step = step
            if engine is None and case.backend == "ddp":
                wrapped.require_backward_grad_sync = last
            if case.backend == "fsdp2":
                set_sync(model, case.fsdp.get("sync", "every"), last)
            if case.bfloat16 and engine is not None:
                xs = xs.bfloat16()
            if case.float16:
                xs = xs.half()
            loss = cross_entropy(wrapped(xs).float(), ys)
            if engine is not None:
                engine.backward(loss)
                poison.after_backward(projector)
                watched = case.float16 or (case.nan_at is not None and case.nan_at[0] == step)
                before = snapshot(projector) if watched else None
                with collectives:
                    engine.step()
            else:
                (loss / case.accumulation).backward()
        if engine is None:
            if projector._early is not None:
                measured_early += len(projector._early.ready())
            if case.backend == "fsdp2":
                average_whole(model)
            poison.after_backward(projector)
            before = snapshot(projector) if case.nan_at is not None and case.nan_at[0] == step else None
            with collectives:
                optimizer.step()
            optimizer.zero_grad()
        elif projector.report.step == step:
            projector.note_engine_skip()
        if before is not None and (projector.report.skipped or not case.float16):
            after = snapshot(projector)
            changed += [key for key in before if not torch.equal(before[key], after[key])]
            changed += sorted(set(before) ^ set(after))
        reports.append(vars(projector.report).copy())
    return {
        "weights": _full_weights(model, engine),
        "strength": projector.strength(),
        "reports": reports,
        "reductions": collectives.seen,
        "reduction_ranks": collectives.ranks,
        "other_collectives": collectives.others,
        "bits": digest(snapshot(projector), reports),
        "state": projector.state_dict(),
        "changed": changed,
        "measured_early": measured_early,
        "empty_shards": [spec.name for spec in projector.backend.specs if spec.numel == 0],
    }


def snapshot(projector: digrap_scale.Projector) -> dict[str, torch.Tensor]:
    """Everything that a skipped step must leave alone: weights, the optimizer's moments, ω's state, what is kept."""
    backend = projector.backend
    found = {f"weight {spec.name}": w for spec, w in zip(backend.specs, backend.weights(), strict=True)}
    for optimizer in backend.hooked:
        for number, state in enumerate(optimizer.state.values()):
            found |= {f"{key} {number}": backend.local(value) for key, value in state.items()}
    found |= {f"method {key}": torch.as_tensor(value) for key, value in projector.method.state().items()}
    if isinstance(projector._previous, KeptWeights):
        found |= {f"previous {i}": kept for i, kept in enumerate(projector._previous.held_tensors())}
    elif isinstance(projector._previous, RecomputedWeights):
        found["last step"] = projector._previous._settings_LS
    return {key: torch.as_tensor(value).detach().clone() for key, value in found.items()}


def digest(tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of this rank's weights, moments, method state and reports: equal exactly where every bit is."""
    parts = {"all": sorted(tensors), "method": sorted(key for key in tensors if key.startswith("method"))}
    found = {"reports": hashlib.sha256(repr(reports).encode()).hexdigest()}
    for part, keys in parts.items():
        sha = hashlib.sha256()
        for key in keys:
            sha.update(key.encode())
            sha.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[part] = sha.hexdigest()
    return found


class Poison:
    """Puts a NaN into one layer's gradient, at ``case.nan_at``. Made before ``attach``: its hook comes first."""

    def __init__(self, case: Case, rank: int, model: torch.nn.Module, engine: Any) -> None:
        self.case, self.rank, self.model, self.step = case, rank, model, -1
        if case.backend == "ddp" and case.nan_layer is not None:  # before the reduction
            dict(model.named_parameters())[case.nan_layer].register_hook(lambda g: g * torch.nan if self.now else g)
        if case.nan_in_hook:
            engine.optimizer.optimizer.register_step_pre_hook(self._in_hook)

    @property
    def now(self) -> bool:
        return self.case.nan_at == (self.step, self.rank)

    def _in_hook(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        (flat,) = (p for group in optimizer.param_groups for p in group["params"])
        if self.now:
            flat.grad[0] = torch.nan

    def after_backward(self, projector: digrap_scale.Projector) -> None:
        if not self.now or self.case.nan_layer is None:
            return
        backend = projector.backend
        layer = [spec.name for spec in backend.specs].index(self.case.nan_layer)
        if self.case.backend == "fsdp2":
            local = backend.local(dict(self.model.named_parameters())[self.case.nan_layer].grad)
        elif self.case.backend.startswith("zero"):
            local = backend._pending_gradient(layer)
        else:
            return
        assert local.numel() > 0, "this rank holds nothing of the layer"
        with torch.no_grad():
            local.view(-1)[0] = torch.nan


def allow_float16() -> None:
    """DeepSpeed asks for a CPU with float16 instructions; torch computes in float16 on any."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def _deepspeed(model: Toy, case: Case, world_size: int) -> tuple[Any, Any]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(case.backend[-1]), "stage3_param_persistence_threshold": 0},
    }
    if case.bfloat16:
        config["bf16"] = {"enabled": True}
    if case.float16:
        allow_float16()
        config["fp16"] = {"enabled": True, "hysteresis": 1}
    for key, value in case.zero.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key].update(value)
        elif value is None:
            del config[key]
        else:
            config[key] = value
    optimizer: torch.optim.Optimizer = make_optimizer(model, case.probes)
    if case.cpu_adam:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(optimizer.param_groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, engine


class Collectives(TorchDispatchMode):
    """(rows, bytes) of the all-reduces while the optimizer steps, and names of other collectives, whoever calls them.

    DeepSpeed's own (never all-reduces of [L, K] float64) are left out.
    """

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.everything = everything
        self.seen: list[tuple[int, int]] = []
        self.others: list[str] = []
        self.ranks: list[int] = []  # how many take part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::allreduce_":
            tensor, group = args[0][0], args[1]
            if self.everything or (tensor.dtype == torch.float64 and tensor.ndim == 2):
                self.seen.append((tensor.shape[0], tensor.numel() * tensor.element_size()))
                self.ranks.append(dist.ProcessGroup.unbox(group).size())
        elif self.everything and func.namespace in ("c10d", "_c10d_functional"):
            self.others.append(func.name())
        return func(*args, **(kwargs or {}))


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
            # Whole on every rank in stages 1 and 2; the public function does not know of round_robin_gradients.
            whole = not hasattr(parameter, "ds_id") and parameter.dtype == torch.float32
            value = parameter if whole else safe_get_full_fp32_param(parameter)
        else:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weights[name] = value.detach().clone()
    return weights
