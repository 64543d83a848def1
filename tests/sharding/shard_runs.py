"""What backends say about their shards, looked at from inside real ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import digrap_scale
from digrap_scale.errors import ConfigError
from tests.distributed.toy import Toy, make_batches, make_toy
from tests.distributed.training_runs import Case, _deepspeed, make_optimizer

SHARE = 2  # samples a rank


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, y = make_batches(1, SHARE * ranks)[0]
    part = slice(rank * SHARE, (rank + 1) * SHARE)
    return x[part], y[part]


class Partly(nn.Module):
    """A body to shard and a scale that is left whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_toy()
        self.loose = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.loose


def fsdp2_shards() -> dict[str, Any]:
    """This rank's intervals, and whether they hold the elements that they say."""
    torch.manual_seed(0)
    model = Partly()
    original = {name: p.detach().clone().reshape(-1) for name, p in model.named_parameters()}
    for block in model.body.blocks:
        fully_shard(block)
    fully_shard(model.body)
    optimizer = make_optimizer(model)
    projector = digrap_scale.attach(model, optimizer, reference="initial")
    x, y = batch()
    cross_entropy(model(x), y).backward()
    dist.all_reduce(model.loose.grad)
    model.loose.grad /= dist.get_world_size()
    squares = torch.zeros((), dtype=torch.float64)
    for p in model.parameters():
        if p.grad is not None:
            squares += (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).double().square().sum()
    optimizer.step()
    specs = projector.backend.specs
    initial = projector._reference.slices_L
    sharded = [p for p in model.parameters() if hasattr(p, "to_local")]
    assert all(projector.backend.local(p).data_ptr() == p.to_local().data_ptr() for p in sharded)
    assert all(torch.equal(projector.backend.local(p), p.to_local()) for p in sharded)
    return {
        "intervals": {spec.name: [spec.start, spec.stop] for spec in specs},
        "replicated": [spec.name for spec in specs if spec.replicated],
        "right": all(torch.equal(r, original[s.name][s.start : s.stop]) for s, r in zip(specs, initial, strict=True)),
        "grad_norm": projector.report.grad_norm,
        "norm": float(squares.sqrt()),
    }


def zero3_views() -> dict[str, Any]:
    """Our views beside what DeepSpeed's public functions say of the same shards, at the optimizer's step."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    results: dict[str, Any] = {}
    for name, zero in {"one": {}, "many": {"zero_optimization": {"sub_group_size": 40}}}.items():
        engine, _ = _deepspeed(make_toy(), Case("zero3", zero=zero), dist.get_world_size())
        projector = digrap_scale.attach(engine, None, method="none")
        backend = projector.backend
        parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        x, y = make_batches(1, 12)[0]
        share = 12 // dist.get_world_size()
        part = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        engine.backward(cross_entropy(engine(x[part]), y[part]))
        # Before the step: public gradient and weight, cut to real elements.
        public = {}
        for spec in backend.specs:
            p = parameters[spec.name]
            public[spec.name] = (
                safe_get_local_grad(p).detach().clone().view(-1),
                safe_get_local_fp32_param(p).detach().clone().view(-1),
            )
        seen: list[dict[str, Any]] = []

        def look(*_: object, seen: list[dict[str, Any]] = seen, backend: Any = backend) -> None:
            if backend.first_of_step():
                for view in backend.views():
                    seen.append({"name": view.spec.name, "grad": view.grad.clone(), "weight": view.weight.clone()})

        for optimizer in backend.hooked:
            optimizer.register_step_pre_hook(look)
        engine.step()
        equal, sizes = True, {}
        for view, spec in zip(seen, backend.specs, strict=True):
            grad, weight = public[view["name"]]
            equal &= torch.equal(view["grad"], grad[: spec.numel]) and torch.equal(view["weight"], weight[: spec.numel])
            sizes[spec.name] = [spec.start, spec.stop, grad.numel()]
        results[name] = {
            "equal": equal,
            "sizes": sizes,
            "sub_groups": len(engine.optimizer.fp16_groups),
            "norm": projector.report.grad_norm,
        }
    return results


class Scaled(nn.Module):
    """The toy, and a 0-d scale in the last place of its group: some ranks hold none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_toy()
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.scale


def zero12_views() -> dict[str, Any]:
    """Our views beside what DeepSpeed's public functions say of the same parameters, before and at the optimizer's step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    results: dict[str, Any] = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings: dict[str, tuple[int, dict[str, Any]]] = {
        "1": (1, {}),
        "2": (2, {}),
        "2 aligned": (2, {"zero_optimization": {"parameter_alignment": True}}),
        "2 round robin": (2, {"zero_optimization": {"round_robin_gradients": True}}),
        "2 bfloat16, float32 sums": (2, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        "1 bfloat16, float32 sums": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    }
    for name, (stage, zero) in settings.items():
        model = Scaled()
        engine, _ = _deepspeed(model, Case(f"zero{stage}", zero=zero), ranks)
        projector = digrap_scale.attach(engine, None, method="none")
        backend = projector.backend
        parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        x, y = make_batches(1, 12)[0]
        part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        dtype = next(engine.module.parameters()).dtype
        engine.backward(cross_entropy(engine(x[part].to(dtype)).float(), y[part]))
        if "round robin" in name:  # which the public functions do not know of; the weights are float32 and whole
            public = {n: (None, p.detach().clone().reshape(-1)) for n, p in parameters.items()}
        else:
            public = {
                n: (safe_get_full_grad(p).reshape(-1), safe_get_full_fp32_param(p).reshape(-1))
                for n, p in parameters.items()
            }
        seen: list[dict[str, Any]] = []

        def look(*_: object, seen: list[dict[str, Any]] = seen, backend: Any = backend) -> None:
            active = set(backend.stepping())
            for layer, view in enumerate(backend.views()):
                assert view.grad is not None or layer not in active
                if layer in active or backend.first_of_step():
                    seen.append(
                        {"name": view.spec.name, "grad": view.grad.float().clone(), "weight": view.weight.clone()}
                    )

        backend.hooked[0].register_step_pre_hook(look)
        engine.step()
        equal = {"grad": True, "weight": True}
        for view in seen:
            spec = next(spec for spec in backend.specs if spec.name == view["name"])
            grad, weight = public[view["name"]]
            if grad is not None:
                equal["grad"] &= torch.equal(view["grad"], grad[spec.start : spec.stop].float())
            equal["weight"] &= torch.equal(view["weight"], weight[spec.start : spec.stop])
        results[name] = {
            "equal": equal,
            "intervals": {spec.name: [spec.start, spec.stop] for spec in backend.specs},
            "seen": len(seen),
            "norm": projector.report.grad_norm,
            "engine": float(engine.get_global_grad_norm()),
        }
    return results


def refusals() -> dict[str, str]:
    """What attach says to sharding that it does not support."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    ranks = dist.get_world_size()
    said: dict[str, str] = {}

    def attempt(key: str, model: Any, optimizer: Any) -> None:
        try:
            digrap_scale.attach(model, optimizer, reference="initial")
            said[key] = "accepted"
        except ConfigError as error:
            said[key] = str(error)

    model = nn.Linear(4, 4)
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else Shard(0))
    attempt("shard 1", model, torch.optim.SGD(model.parameters(), lr=0.1))

    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "tensor"))
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh["tensor"], [Shard(0)]))
    model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh["tensor"], [Shard(0)]))
    fully_shard(model, mesh=mesh["data"])
    attempt("tensor parallel", model, torch.optim.SGD(model.parameters(), lr=0.1))

    model = make_toy()
    one = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    hybrid = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.blocks[0], mesh=one)
    fully_shard(model, mesh=hybrid)
    attempt("meshes of two kinds", model, torch.optim.SGD(model.parameters(), lr=0.1))

    fsdp1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor wants an accelerator
    nn.Module.__init__(fsdp1)
    attempt("fsdp1", fsdp1, torch.optim.SGD(make_toy().parameters(), lr=0.1))

    engine, _ = _deepspeed(make_toy(), Case("zero0", zero={"bf16": {"enabled": True}}), ranks)
    attempt("half precision at stage 0", engine, None)

    model = make_toy()
    fully_shard(model)
    plain = [p for p in make_toy().parameters()]
    attempt("optimizer before sharding", model, torch.optim.SGD(plain, lr=0.1))

    sharded = make_toy()
    fully_shard(sharded)
    other = make_toy()
    theta0 = dict(sharded.named_parameters())
    try:
        digrap_scale.attach(other, torch.optim.SGD(other.parameters(), lr=0.1), reference=theta0)
        said["sharded mapping"] = "accepted"
    except ConfigError as error:
        said["sharded mapping"] = str(error)

    engine, _ = _deepspeed(make_toy(), Case("zero3", zero={"gradient_clipping": 1.0}), ranks)
    try:
        digrap_scale.attach(engine, None, reference="initial", max_grad_norm=0.5)
        said["two clips"] = "accepted"
    except ConfigError as error:
        said["two clips"] = str(error)
    return said


def compiled_ddp() -> list[str]:
    """Names under torch.compile around DDP."""
    model: Toy = make_toy()
    wrapped = torch.compile(DistributedDataParallel(model, find_unused_parameters=True), backend="eager")
    projector = digrap_scale.attach(wrapped, make_optimizer(wrapped), reference="initial")
    return [*projector.strength(), projector.backend.name]


def two_ranks() -> dict[str, Any]:
    return {"fsdp2": fsdp2_shards(), "refusals": refusals(), "compiled": compiled_ddp()}


def three_ranks() -> dict[str, Any]:
    return {"fsdp2": fsdp2_shards(), "zero3": zero3_views(), "zero12": zero12_views()}
