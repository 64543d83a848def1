"""Half precision under DeepSpeed's stages 1, 2 and 3: bfloat16, float16 with a dynamic loss scale, and torch.autocast.

Tolerances as in test_bfloat16: F · 2 · lr · C · u for weights, F · 2 · μ · C · u for ω, with C = 4 maps on a gradient's
way. bfloat16: u = 2⁻⁸ and F = 4 flips a run. float16: u = 2⁻¹¹; a master falls on two sides of a rounding boundary with
probability e / u = 2⁻¹², 1.2 times a run of 170 weights and 30 steps: F = 10 are allowed for. What the order of sums over more
than two ranks changes is added, as there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed.low_precision import LossScale, low_precision_in_any_order
from tests.distributed.ranks import run_ranks
from tests.distributed.toy import make_theta0, make_toy
from tests.distributed.training_runs import LR, STEPS, Case, train_all

MU = 0.05
Trained = tuple[int, list[dict[str, Any]]]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLIPS = {torch.bfloat16: 4, torch.float16: 10}
MAPS = 4


class Run(NamedTuple):
    """A case, and how the plain training differs from bfloat16 without a loss scale."""

    case: Case
    dtype: torch.dtype = torch.bfloat16
    power: int | None = None
    window: int = 1000
    autocast: bool = False


def case(stage: int, method: str = "digrap", **more: Any) -> Case:
    return Case(f"zero{stage}", method, options={"strength_lr": MU}, **more)


def float16(stage: int, method: str = "digrap", power: int = 22, window: int = 1000, **more: Any) -> Run:
    """Initial loss scale 2^power; at 2²² the first steps overflow."""
    zero = more.pop("zero", {}) | {"fp16": {"initial_scale_power": power, "loss_scale_window": window}}
    return Run(case(stage, method, float16=True, zero=zero, **more), torch.float16, power, window)


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1 DeepSpeed takes its BF16_Optimizer
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
CLIPS = {"gradient_clipping": 0.5}

RUNS = {
    "bfloat16 1": Run(case(1, bfloat16=True)),
    "bfloat16 1 float32 sums": Run(case(1, "digrap_update", bfloat16=True, zero=SUMS | CLIPS, max_grad_norm=0.5)),
    "bfloat16 2": Run(case(2, "digrap_update", bfloat16=True, zero={"communication_data_type": "fp32"})),
    "bfloat16 2 float32 sums": Run(case(2, bfloat16=True, zero=SUMS)),
    "float16 1": float16(1),
    "float16 1 scale grows": float16(1, power=8, window=6, zero=CLIPS, max_grad_norm=0.5),
    "float16 2": float16(2, "digrap_update"),
    "float16 2 offload": float16(2, zero=OFFLOAD),
    "float16 2 float32 sums": float16(2, zero=SUMS, power=8, window=6),
    "float16 3": float16(3),
    "float16 3 scale grows": float16(3, "digrap_update", power=8, window=6, zero=CLIPS, max_grad_norm=0.5),
    "autocast 1": Run(case(1, zero=AUTOCAST), autocast=True),
    "autocast 2": Run(case(2, zero=AUTOCAST), autocast=True),
    "autocast 3": Run(case(3, "digrap_update", zero=AUTOCAST), autocast=True),
}


# By default: each precision and each stage, on two ranks; the others with the long tests, which take all on three and four.
USUAL = ("bfloat16 1 float32 sums", "bfloat16 2", "float16 1 scale grows", "float16 2", "float16 3", "autocast 3")
PLACES = [
    pytest.param((2, USUAL), id="2"),
    pytest.param((2, tuple(key for key in RUNS if key not in USUAL)), id="2, the rest", marks=pytest.mark.slow),
    *(pytest.param((ranks, tuple(RUNS)), id=str(ranks), marks=pytest.mark.slow) for ranks in (3, 4)),
]


@pytest.fixture(scope="module", params=PLACES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    ranks, keys = request.param
    cases = {key: RUNS[key].case for key in keys}
    return ranks, run_ranks(ranks, tmp_path_factory.mktemp("zero"), train_all, cases)


def results_of(trained: Trained, key: str) -> list[dict[str, Any]]:
    if key not in trained[1][0]:
        pytest.skip("a case of the long tests")
    return trained[1]


@pytest.mark.parametrize("key", RUNS)
def test_equals_plain_training(trained: Trained, key: str) -> None:
    ranks, results = trained[0], results_of(trained, key)
    run = RUNS[key]
    scale = None if run.power is None else LossScale(2.0**run.power, run.window)
    reference, by_order, strength_by_order = low_precision_in_any_order(
        run.case.method,
        make_theta0(make_toy()),
        rounded_start=not run.autocast,
        ranks=ranks,
        mu=MU,
        dtype=run.dtype,
        loss_scale=scale,
        max_grad_norm=run.case.max_grad_norm,
        autocast=run.autocast,
    )
    unit = FLIPS[run.dtype] * 2 * MAPS * UNIT[run.dtype]
    weight_tolerance, strength_tolerance = max(LR.values()) * unit + by_order, MU * unit + strength_by_order
    assert max(reference.omega.values()) > 0.1 > 3 * strength_tolerance
    for got in (rank[key] for rank in results):
        for name, weight in reference.w.items():
            assert got["weights"][name].dtype == torch.float32
            torch.testing.assert_close(got["weights"][name], weight, atol=weight_tolerance, rtol=0)
        for name, omega in reference.omega.items():
            assert got["strength"][name] == pytest.approx(omega, abs=strength_tolerance), name
        assert got["strength"] == results[0][key]["strength"], "ω differs in its bits between ranks"
        skipped = [step for step, report in enumerate(got["reports"]) if report["skipped"]]
        assert skipped == ([] if scale is None else scale.skipped)
        if run.power == 22:
            assert len(skipped) > 3 and skipped[-1] > 5, "overflows at the start, and one after steps were taken"
        assert bool(scale and scale.grown) == (run.window < STEPS)


@pytest.mark.parametrize("key", [key for key, run in RUNS.items() if run.power == 22])
def test_an_overflow_changes_nothing(trained: Trained, key: str) -> None:
    """Weights, moments, ω's state and p_{t-1} keep their bits, and the report names layers, the same on every rank."""
    names = {name for name, p in make_toy().named_parameters() if p.requires_grad and "unused" not in name}
    results = results_of(trained, key)
    for rank in results:
        assert rank[key]["changed"] == []
        for report, other in zip(rank[key]["reports"], results[0][key]["reports"], strict=True):
            assert report["nonfinite_layers"] == other["nonfinite_layers"]
            if report["skipped"]:
                assert report["nonfinite_layers"] and set(report["nonfinite_layers"]) <= names
