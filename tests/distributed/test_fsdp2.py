"""FSDP2 in the ways that people use it: HSDP, CPU offload, modules left whole, accumulation without reduction, more ranks
than rows. Each equals one process, with one reduction a step over the ranks that hold different shards, and replicas
agree in every bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_equivalence import METHODS, compare, expected
from tests.distributed.training_runs import STEPS, Case, train_all

Results = list[dict[str, Any]]


def case(method: str = "digrap", **changes: Any) -> Case:
    return Case("fsdp2", method, options=METHODS[method], **changes)


# On any number of ranks. "gain" has one element: its shard is empty on all ranks but one.
EVERYWHERE = {
    "offload": case(fsdp={"offload": True}, max_grad_norm=0.5),
    "offload update": case("digrap_update", fsdp={"offload": True}),
    "no reshard": case(fsdp={"reshard": False}),
    "whole": case(fsdp={"whole": ("head", "unused", "blocks.1.up")}, max_grad_norm=0.5),
    "whole update": case("digrap_update", fsdp={"whole": ("embed", "blocks.0")}),
    "no sync": case(accumulation=2, max_grad_norm=0.5, fsdp={"sync": "last"}),
}


def check(cases: dict[str, Case], key: str, results: Results) -> None:
    reference = expected(cases[key])
    for got in results:
        compare(cases[key], got[key], reference)
        for part in ("method", "reports"):
            assert got[key]["bits"][part] == results[0][key]["bits"][part], f"{part} differs in its bits between ranks"
        layers = len(got[key]["state"]["layers"].get("strength", ())) or 15
        assert [rows for rows, _ in got[key]["reductions"]] == [layers] * STEPS * (
            1 + (cases[key].method in ("digrap_update", "spd"))
        )


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(request.param, tmp_path_factory.mktemp("fsdp2"), train_all, EVERYWHERE)


@pytest.mark.parametrize("key", EVERYWHERE)
def test_equals_one_process(trained: Results, key: str) -> None:
    check(EVERYWHERE, key, trained)
    assert {ranks for got in trained for ranks in got[key]["reduction_ranks"]} == {len(trained)}


FOUR = {
    "one axis": case("digrap_update", fsdp={"whole": ("head",), "offload": True}),
    "hybrid": case(fsdp={"replicas": 2}),
    "hybrid again": case(fsdp={"replicas": 2}),
    "hybrid update": case("digrap_update", fsdp={"replicas": 2, "whole": ("blocks.0.down", "head")}),
    "hybrid replicas last": case(accumulation=3, max_grad_norm=0.5, fsdp={"replicas": 2, "sync": "replicas"}),
}
MORE = {
    "one axis digrap": case(),
    "hybrid spd": case("spd", fsdp={"replicas": 2, "offload": True}),
    "hybrid stored": replace(
        case(fsdp={"replicas": 2, "offload": True}, max_grad_norm=0.5, accumulation=3),
        options={"strength_lr": 0.05, "previous": "stored"},
    ),
    "hybrid no sync": case(accumulation=3, fsdp={"replicas": 2, "sync": "last", "reshard": False}),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(4, tmp_path_factory.mktemp("four"), train_all, FOUR)


def check_four(cases: dict[str, Case], key: str, four: Results) -> None:
    check(cases, key, four)
    shards = 2 if key.startswith("hybrid") else 4
    assert {ranks for got in four for ranks in got[key]["reduction_ranks"]} == {shards}
    if key.startswith("hybrid"):
        # Ranks 0 and 1 hold one copy, 2 and 3 the other.
        for rank in (0, 1):
            assert four[rank][key]["bits"] == four[rank + 2][key]["bits"], "replicas differ in their bits"
        assert four[0][key]["bits"]["all"] != four[1][key]["bits"]["all"], "they should hold different shards"
    else:
        assert all(any("gain" in name for name in got[key]["empty_shards"]) for got in four[1:])


@pytest.mark.slow
@pytest.mark.parametrize("key", FOUR)
def test_four_ranks(four: Results, key: str) -> None:
    check_four(FOUR, key, four)


@pytest.mark.slow
def test_four_ranks_more(tmp_path: Path) -> None:
    results = run_ranks(4, tmp_path / "four", train_all, MORE)
    for key in MORE:
        check_four(MORE, key, results)


def test_a_run_repeats_itself_bit_by_bit(four: Results) -> None:
    for got in four:
        assert got["hybrid"]["bits"] == got["hybrid again"]["bits"]


@pytest.mark.slow
def test_more_ranks_than_rows(tmp_path: Path) -> None:
    cases = {"five": case(samples=10), "update": case("digrap_update", samples=10, fsdp={"offload": True})}
    results = run_ranks(5, tmp_path / "five", train_all, cases)
    for key in cases:
        check(cases, key, results)
    assert len(results[4]["five"]["empty_shards"]) >= 10, "five ranks leave the last one next to nothing"
