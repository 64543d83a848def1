"""A gradient that is not finite on one rank: the step is skipped on all of them, and nothing remembers it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.toy import make_batches, make_toy, pure_loss
from tests.distributed.training_runs import DECAY, GLOBAL_BATCH, LR, Case, group_of, theta0_of, train_all
from tests.plain_digrap import Reference, run

BAD_STEP, STEPS = 7, 14
GAIN = "blocks.1.gain"  # one element: rank 0's, the other ranks' shards are empty
OPTIONS = {"strength_lr": 0.05}


def make_cases(backend: str, ranks: int) -> dict[str, Case]:
    common: dict[str, Any] = {"backend": backend, "steps": STEPS, "options": OPTIONS}
    cases = {
        # The last rank's batch is bad: every layer that it reaches is.
        "batch": Case(nan_at=(BAD_STEP, ranks - 1), **common),
        # One layer of one rank, which the other ranks hold nothing of.
        "layer": Case(nan_at=(BAD_STEP, 0), nan_layer=GAIN, max_grad_norm=0.5, **common),
        "update": Case(method="digrap_update", nan_at=(BAD_STEP, 0), nan_layer=GAIN, **common),
        "first": Case(nan_at=(0, ranks - 1), **common),
        "plain": Case(**common),
    }
    if backend == "zero3":
        cases["sub_groups"] = Case(
            nan_at=(BAD_STEP, 0), nan_layer=GAIN, zero={"zero_optimization": {"sub_group_size": 4}}, **common
        )
    if backend.startswith("zero"):
        # The engine skips the steps above by itself; here only the hooks can.
        cases["in_hook"] = Case(method="digrap_update", nan_at=(BAD_STEP, 0), nan_in_hook=True, **common)
    return cases


KEYS = ["batch", "layer", "update", "first", "sub_groups", "in_hook"]
Trained = tuple[str, dict[str, Case], list[dict[str, Any]]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((backend, ranks), id=f"{backend}-{ranks}", marks=marks)
        for backend, ranks, marks in [
            ("ddp", 2, ()),
            ("fsdp2", 2, pytest.mark.slow),
            ("fsdp2", 3, ()),
            ("zero1", 2, pytest.mark.slow),
            ("zero2", 3, pytest.mark.slow),
            ("zero3", 2, pytest.mark.slow),
            ("zero3", 3, ()),
        ]
    ],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    backend, ranks = request.param
    cases = make_cases(backend, ranks)
    return backend, cases, run_ranks(ranks, tmp_path_factory.mktemp(backend), train_all, cases)


def expected(case: Case) -> Reference:
    """The plain transcription, with a batch at the bad step that makes its gradient NaN: it skips."""
    model = make_toy()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    reference = Reference(
        trained,
        theta0_of(case, model),
        case.method,
        lr=lambda name: LR[group_of(name)],
        weight_decay=lambda name: DECAY[group_of(name)],
        max_grad_norm=case.max_grad_norm,
        **case.options,
    )
    batches = make_batches(case.steps, GLOBAL_BATCH)
    bad = case.nan_at[0]
    batches[bad] = (batches[bad][0] * math.nan, batches[bad][1])
    return run(reference, lambda w, batch: pure_loss({**w, **frozen}, batch), batches)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_changes_in_the_skipped_step(trained: Trained, key: str) -> None:
    _, cases, results = trained
    if key not in cases:
        pytest.skip("a case of another backend, or of another number of ranks")
    for got in results:
        assert got[key]["changed"] == [], "not the same bits as before the step"


@pytest.mark.parametrize("key", KEYS)
def test_report_names_the_layers(trained: Trained, key: str) -> None:
    backend, cases, results = trained
    if key not in cases:
        pytest.skip("a case of another backend, or of another number of ranks")
    case = cases[key]
    bad = case.nan_at[0]
    names = [name for name, p in make_toy().named_parameters() if p.requires_grad and "unused" not in name]
    for got in results:
        reports = got[key]["reports"]
        assert [report["skipped"] for report in reports] == [step == bad for step in range(STEPS)]
        assert [report["step"] for report in reports] == list(range(1, STEPS + 1))
        if case.nan_in_hook:
            assert len(reports[bad]["nonfinite_layers"]) == 1
        else:
            assert sorted(reports[bad]["nonfinite_layers"]) == sorted([GAIN] if case.nan_layer else names)
            assert not math.isfinite(reports[bad]["grad_norm"])
        assert all(report["nonfinite_layers"] == [] for step, report in enumerate(reports) if step != bad)
        if bad:
            assert reports[bad]["strength_mean"] == reports[bad - 1]["strength_mean"]


@pytest.mark.parametrize("key", KEYS)
def test_training_goes_on_as_if_the_step_had_not_been(trained: Trained, key: str) -> None:
    _, cases, results = trained
    if key not in cases:
        pytest.skip("a case of another backend, or of another number of ranks")
    reference = expected(cases[key])
    for got in results:
        for name, weight in reference.w.items():
            torch.testing.assert_close(got[key]["weights"][name], weight, atol=1e-5, rtol=0)
        for name, omega in reference.omega.items():
            assert got[key]["strength"][name] == pytest.approx(omega, abs=1e-5), name
        assert max(got[key]["strength"].values()) > 0.02
        if cases[key].method == cases["plain"].method:
            assert got[key]["strength"] != got["plain"]["strength"], "the skipped step made no difference at all"


def test_some_ranks_hold_nothing_of_the_bad_layer(trained: Trained) -> None:
    backend, _, results = trained
    empty = [GAIN in got["layer"]["empty_shards"] for got in results]
    assert empty == ([False] * len(results) if backend == "ddp" else [False] + [True] * (len(results) - 1))
