"""DeepSpeed's stages 1, 2 and 3 with the options that move gradients about, against the plain transcription, float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_equivalence import METHODS, compare, expected, on_four_ranks
from tests.distributed.training_runs import Case, train_all

FUSED = {"strength_lr": 0.05, "projection": "fused"}
CLIPS = {"gradient_clipping": 0.5}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def case(stage: int, method: str = "digrap", zero_optimization: dict[str, Any] | None = None, **more: Any) -> Case:
    """Keys of ``zero`` that are None are left out of the config: DeepSpeed's own defaults."""
    top = {**more.pop("zero", {}), "zero_optimization": zero_optimization or {}}
    return Case(f"zero{stage}", method, **{"options": METHODS[method], "zero": top, **more})


# What every number of ranks takes.
CORE = {
    "1 plain": case(1),
    "1 update, accumulation": case(1, "digrap_update", accumulation=2),
    "1 engine clips": case(1, max_grad_norm=0.5, zero={"gradient_clipping": 0.5}),
    "2 plain": case(2, max_grad_norm=0.5),
    "2 update, engine clips by default": case(2, "digrap_update", max_grad_norm=1.0, zero={"gradient_clipping": None}),
    "2 accumulation": case(2, accumulation=2),
    "1 ftp": case(1, "ftp"),
    "2 lp_ft": case(2, "lp_ft", max_grad_norm=0.1),
    "1 fused": replace(case(1, max_grad_norm=0.5), options=FUSED, large_elements=4),
    "2 fused": replace(case(2, accumulation=2), options=FUSED),
}
OPTIONS = {
    "0 is DDP": case(0, accumulation=2),
    "1 spd": case(1, "spd"),
    "1 no norm": case(1, "digrap", {"compute_grad_norm": False}, max_grad_norm=0.5),
    "1 offload": case(1, "digrap", OFFLOAD, zero={"zero_force_ds_cpu_optimizer": False}),
    "2 ftp, offload, engine clips": case(
        2, "ftp", OFFLOAD, max_grad_norm=0.5, zero={"zero_force_ds_cpu_optimizer": False, **CLIPS}
    ),
    "2 round robin": case(2, "digrap_update", {"round_robin_gradients": True}),
    "2 overlap, small buckets": case(
        2, "digrap", {"overlap_comm": True, "reduce_bucket_size": 20, "allgather_bucket_size": 20}, accumulation=2
    ),
    "2 fused, offload, engine clips": replace(
        case(2, "digrap", OFFLOAD, max_grad_norm=0.5, zero={"zero_force_ds_cpu_optimizer": False, **CLIPS}),
        options=FUSED,
        large_elements=4,
    ),
    "2 offload": case(
        2,
        "digrap_update",
        OFFLOAD,
        max_grad_norm=0.5,
        accumulation=2,
        zero={"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.5},
    ),
    # Small parameters stay whole on every rank between steps; the threshold of 30 elements keeps some.
    "3 default persistence": case(3, "digrap", {"stage3_param_persistence_threshold": 100_000}),
    "3 persistence, sub-groups": case(
        3, "digrap_update", {"stage3_param_persistence_threshold": 30, "sub_group_size": 20}, max_grad_norm=0.5
    ),
    "3 offload": case(
        3,
        "digrap",
        {**OFFLOAD, "sub_group_size": 20},
        max_grad_norm=1.0,
        zero={"zero_force_ds_cpu_optimizer": False, "gradient_clipping": None},
    ),
}
SLOW = {
    "1 whole gradients reduced": case(1, "digrap_update", {"reduce_scatter": False}, accumulation=2),
    "1 gradients not contiguous": case(1, "digrap", {"contiguous_gradients": False}, max_grad_norm=0.5),
    "1 lp_ft, offload": case(1, "lp_ft", OFFLOAD, zero={"zero_force_ds_cpu_optimizer": False}),
    "2 aligned": case(2, "digrap", {"parameter_alignment": True}, max_grad_norm=0.5),
    "2 l2sp": case(2, "l2sp", max_grad_norm=0.5),
    "3 hpz": case(3, "digrap", {"zero_hpz_partition_size": 2}),  # needs an even number of ranks
    **{f"{stage} linear_probe": case(stage, "linear_probe") for stage in (1, 2)},
    **{f"{stage} pcgrad": case(stage, "pcgrad", without_reference=(".gain",)) for stage in (1, 2)},
    "1 l2sp": case(1, "l2sp"),
    "2 spd": case(2, "spd"),
    **{f"{stage} blocks": case(stage, options={"strength_lr": 0.05, "grouping": "block"}) for stage in (1, 2)},
    **{f"{stage} fixed": case(stage, options={"fixed_strength": 0.5}) for stage in (1, 2)},
    # DeepSpeed builds its own Adam at first use.
    "1 DeepSpeedCPUAdam": case(1, "digrap", OFFLOAD, cpu_adam=True),
    "2 DeepSpeedCPUAdam": case(2, "digrap_update", OFFLOAD, cpu_adam=True, accumulation=2),
    "3 DeepSpeedCPUAdam": case(3, "digrap", {**OFFLOAD, "sub_group_size": 20}, cpu_adam=True),
}


def cases_of(ranks: int, rest: bool) -> dict[str, Case]:
    every = {key: one for key, one in {**CORE, **OPTIONS, **SLOW}.items() if key != "3 hpz" or ranks % 2 == 0}
    if ranks < 4:
        usual = CORE if ranks == 2 else OPTIONS
        return {key: one for key, one in every.items() if key not in usual} if rest else usual
    return on_four_ranks(every)


PLACES = [
    pytest.param((2, False), id="2 ranks"),
    pytest.param((3, False), id="3 ranks"),
    pytest.param((2, True), id="2 ranks, the rest", marks=pytest.mark.slow),
    pytest.param((3, True), id="3 ranks, the rest", marks=pytest.mark.slow),
    pytest.param((4, False), id="4 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=PLACES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Case], list[dict]]:
    cases = cases_of(*request.param)
    return cases, run_ranks(request.param[0], tmp_path_factory.mktemp("zero"), train_all, cases)


@pytest.mark.parametrize("key", [*CORE, *OPTIONS, *SLOW])
def test_equals_one_process(trained: tuple[dict[str, Case], list[dict]], key: str) -> None:
    cases, results = trained
    if key not in cases:
        pytest.skip("a case of another backend, or of another number of ranks")
    reference = expected(cases[key])
    for got in results:
        compare(cases[key], got[key], reference)
        assert got[key]["strength"] == results[0][key]["strength"], "ω differs in its bits between ranks"


def test_one_reduction_a_step(trained: tuple[dict[str, Case], list[dict]]) -> None:
    """For all parameter groups together; a method that acts on the update takes one more for each."""
    cases, results = trained
    for got in results:
        for key, one in cases.items():
            layers = len(got[key]["state"]["layers"].get("strength", ())) or 15
            first = [(rows, size) for rows, size in got[key]["reductions"] if size == rows * 4 * 8]
            assert first == ([] if one.backend == "zero0" else [(layers, layers * 4 * 8)] * one.steps), key
            if one.method == "digrap" and one.backend != "zero0":
                assert len(got[key]["reductions"]) == one.steps, key
