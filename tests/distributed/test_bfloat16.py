"""bfloat16: sharded mixed precision with float32 masters, and weights that are bfloat16 themselves.

Tolerances. u = 2⁻⁸ is bfloat16's unit roundoff. Both sides of a comparison compute gradients in bfloat16 by the same
operations, so they differ only where a master weight, equal on both sides to about e = 2⁻²³ of itself, falls on two
sides of a rounding boundary. That happens to a weight in a step with probability e / u = 2⁻¹⁵: about 170 weights and
30 steps give 0.16 such flips a run; F = 4 are allowed for. A flip changes a weight by u of itself, and the gradients
through it by C · u of themselves, C = 4 being the maps on its way (block, block, head, loss). Adam's step lr · m̂ / √v̂
is homogeneous of degree 0 in the gradient: it changes by at most 2 · lr · C · u. So

    weights: F · 2 · lr · C · u = 4 · 2 · 0.02 · 4 / 256 = 2.5e-3
    ω:       F · 2 · μ · C · u = 4 · 2 · 0.05 · 4 / 256 = 6.3e-3.

A sum of more than two numbers in bfloat16 depends on their order, which is the collective's own. What the order alone does to
this run is measured, with the ranks in all other orders, and the most of it is allowed for, too.

A weight that is stored in bfloat16 may in addition be rounded the other way: u of itself.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import digrap_scale
from tests.distributed.low_precision import apart_by, low_precision_in_any_order, low_precision_run
from tests.distributed.ranks import run_ranks
from tests.distributed.toy import make_batches, make_theta0, make_toy
from tests.distributed.training_runs import (
    GLOBAL_BATCH,
    LR,
    STEPS,
    Case,
    group_of,
    make_optimizer,
    train_toy,
)

Trained = tuple[str, int, list[dict[str, Any]]]
BACKENDS = ("fsdp2", "fsdp2 float32 sums", "zero3")
QUICK = (("fsdp2", 2), ("zero3", 2))
MU = 0.05
UNIT, MAPS, FLIPS = 2.0**-8, 4, 4
WEIGHT_TOLERANCE = FLIPS * 2 * max(LR.values()) * MAPS * UNIT
STRENGTH_TOLERANCE = FLIPS * 2 * MU * MAPS * UNIT
METHODS = ("digrap", "digrap_update")


def train_methods(backend: str, file: str) -> dict[str, Any]:
    results = {}
    for method in METHODS:
        fsdp = {"reduce_float32": True} if backend == "fsdp2 float32 sums" else {}
        case = Case(
            backend.split()[0], method, bfloat16=True, reference_file=file, options={"strength_lr": MU}, fsdp=fsdp
        )
        results[method] = train_toy(case)
    return results


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    save_file(make_theta0(make_toy(), torch.bfloat16), path)
    return path


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (backend, ranks), id=f"{backend}-{ranks}", marks=[] if (backend, ranks) in QUICK else pytest.mark.slow
        )
        for backend in BACKENDS
        for ranks in (2, 3, 4)
    ],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, file: Path) -> Trained:
    backend, ranks = request.param
    return backend, ranks, run_ranks(ranks, tmp_path_factory.mktemp(backend), train_methods, backend, str(file))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_with_float32_masters(trained: Trained, method: str) -> None:
    backend, ranks, results = trained
    theta0 = make_theta0(make_toy(), torch.bfloat16)
    sums = torch.float32 if "float32" in backend else torch.bfloat16

    settings: dict[str, Any] = {"rounded_start": backend == "zero3", "ranks": ranks, "mu": MU, "sums": sums}
    reference, by_order, strength_by_order = low_precision_in_any_order(method, theta0, **settings)
    plain = low_precision_run("none", theta0, **settings)
    weight_tolerance, strength_tolerance = WEIGHT_TOLERANCE + by_order, STRENGTH_TOLERANCE + strength_by_order
    for got in results:
        for name, weight in reference.w.items():
            value = got[method]["weights"][name]
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, weight, atol=weight_tolerance, rtol=0)
        for name, omega in reference.omega.items():
            assert got[method]["strength"][name] == pytest.approx(omega, abs=strength_tolerance), name
        assert max(reference.omega.values()) > 2 * strength_tolerance
    assert apart_by(plain.w, reference.w) > 2 * weight_tolerance, "the comparison could not tell the method from none"
    assert all(got[method]["strength"] == results[0][method]["strength"] for got in results)


def plain_bfloat16(theta0: dict[str, torch.Tensor], mu: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """DiGraP on bfloat16 weights, moments and gradients: equations in float64, results rounded where stored."""
    model = make_toy().bfloat16()
    optimizer = make_optimizer(model)
    named = dict(model.named_parameters())
    omega, m, v = (dict.fromkeys(theta0, 0.0) for _ in range(3))
    p: dict[str, torch.Tensor] = {}
    for t, (x, y) in enumerate(make_batches(STEPS, GLOBAL_BATCH)):
        cross_entropy(model(x.bfloat16()).float(), y).backward()
        zero = {n: torch.zeros_like(named[n], dtype=torch.float64) for n in theta0}
        g = {n: zero[n] if named[n].grad is None else named[n].grad.double() for n in theta0}
        if t > 0:
            h = {n: LR[group_of(n)] * float((g[n] * p[n]).sum()) for n in theta0}
            total = math.sqrt(sum(value**2 for value in h.values()))
            for n, value in h.items():
                value = value / total if total else 0.0
                m[n], v[n] = 0.9 * m[n] + 0.1 * value, 0.999 * v[n] + 0.001 * value**2
                step = m[n] / (1 - 0.9**t) / (math.sqrt(v[n] / (1 - 0.999**t)) + 1e-8)
                omega[n] = min(1.0, max(0.0, omega[n] - mu * step))
        for n in theta0:
            d = named[n].detach().double() - theta0[n].double()
            inner, square = float((g[n] * d).sum()), float((d * d).sum())
            p[n] = (inner / square if square else 0.0) * d
            if inner < 0:
                named[n].grad = (g[n] - omega[n] * p[n]).bfloat16()
        optimizer.step()
        optimizer.zero_grad()
    return {n: w.detach().clone() for n, w in named.items()}, omega


def test_bfloat16_weights_in_one_process(file: Path) -> None:
    model = make_toy().bfloat16()
    optimizer = make_optimizer(model)
    projector = digrap_scale.attach(model, optimizer, reference=file, not_projected=["^head"], strength_lr=MU)
    assert {r.dtype for r in projector._reference.slices_L if r is not None} == {torch.bfloat16}
    for x, y in make_batches(STEPS, GLOBAL_BATCH):
        cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, omega = plain_bfloat16(make_theta0(make_toy(), torch.bfloat16), MU)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.detach(), weights[name], atol=WEIGHT_TOLERANCE, rtol=UNIT)
    for name, value in projector.strength().items():
        assert value == pytest.approx(omega[name], abs=STRENGTH_TOLERANCE), name
    assert max(omega.values()) > 2 * STRENGTH_TOLERANCE


def test_master_weights_see_small_displacements(file: Path) -> None:
    """The statistics are of float32 differences: a bfloat16 displacement of a bfloat16 weight would be 0 here."""
    theta0 = make_theta0(make_toy(), torch.bfloat16)
    model = make_toy()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in theta0:
                parameter.copy_(theta0[name].float() * (1 + 2.0**-12))
    optimizer = make_optimizer(model)
    projector = digrap_scale.attach(model, optimizer, reference=file, not_projected=["^head"])
    x, y = make_batches(1, GLOBAL_BATCH)[0]
    cross_entropy(model(x), y).backward()
    before = {n: p.detach().double() - theta0[n].double() for n, p in model.named_parameters() if n in theta0}
    optimizer.step()
    found = dict(
        zip((s.name for s in projector.backend.specs), projector.method.displacement_sq_L.tolist(), strict=True)
    )
    for name, d in before.items():
        assert found[name] == pytest.approx(float(d.square().sum()), rel=1e-5) and found[name] > 0
