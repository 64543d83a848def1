"""Every backend equals one process: thirty steps against the plain transcription of the equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.ranks import run_ranks
from tests.distributed.toy import make_batches, make_theta0, make_toy, pure_loss
from tests.distributed.training_runs import (
    DECAY,
    LR,
    STEPS,
    Case,
    group_of,
    theta0_of,
    train_all,
    train_toy,
)
from tests.plain_digrap import Reference, run

TOLERANCE = 1e-5  # float32: 30 steps, sums in another order


def expected(case: Case) -> Reference:
    model = make_toy()
    theta0 = {} if case.probes else theta0_of(case, model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    options = {key: value for key, value in case.options.items() if key not in OURS}
    if "grouping" in options:
        options["grouping"] = {"module": lambda name: name.rpartition(".")[0], "block": block_of}[options["grouping"]]
    if case.probes:
        options["head"] = "head."
    reference = Reference(
        trained,
        theta0,
        case.method,
        lr=lambda name: LR[group_of(name)],
        weight_decay=lambda name: DECAY[group_of(name)],
        max_grad_norm=case.max_grad_norm,
        **options,
    )
    return run(reference, lambda w, batch: pure_loss({**w, **frozen}, batch), make_batches(case.steps, case.samples))


def block_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name


def compare(case: Case, got: dict, reference: Reference, tolerance: float = TOLERANCE) -> None:
    for name, value in reference.w.items():
        torch.testing.assert_close(
            got["weights"][name], value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(got["strength"]) == set(reference.omega)
    if case.method in ("digrap", "digrap_update"):
        for name, omega in reference.omega.items():
            assert got["strength"][name] == pytest.approx(omega, abs=tolerance), name
        assert max(reference.omega.values()) > 0.02, "the run does not exercise ω"
    for report, norm in zip(got["reports"], reference.grad_norms, strict=True):
        assert report["grad_norm"] == pytest.approx(norm, rel=1e-4)
    if case.method == "ftp":
        check_gammas(got, reference, tolerance)
    assert reference.conflicts > 20 or case.method in ("l2sp", "spd") or case.probes


def check_gammas(got: dict, reference: Reference, tolerance: float) -> None:
    gammas = got["state"]["layers"]["gamma"]
    for name, gamma in reference.gamma.items():
        assert float(gammas[name]) == pytest.approx(gamma, abs=tolerance), name
    assert max(reference.gamma.values()) > 0.02, "γ does not grow"
    projected = sum(bool((reference.c_norms[n] > gamma).any()) for n, gamma in reference.gamma.items())
    assert projected > 4, "in the last step no row is projected"


METHODS = {
    "digrap": {"strength_lr": 0.05},
    "digrap_update": {"strength_lr": 0.05},
    "pcgrad": {},
    "l2sp": {"weight": 0.1},
    "spd": {"weight": 0.5},
    "ftp": {"annealing": 0.5},
    "linear_probe": {"head": ["^head"]},
    # Not 12: there an element's first gradient of the second phase is next to 0, of which Adam makes a full step.
    "lp_ft": {"head": ["^head"], "probe_steps": 10},
}


@pytest.mark.parametrize("method", METHODS)
def test_single_process(method: str) -> None:
    # ω = 1 leaves a one-element layer no gradient but rounding noise, which Adam blows up to full steps: not comparable.
    without = (".gain",) if method == "pcgrad" else ()
    case = Case("single", method, options=METHODS[method], without_reference=without)
    compare(case, train_toy(case), expected(case))


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "cosine"},
        {"normalization": "none"},
        {"hypergradient": "conflicts"},
        {"previous": "stored"},
        {"grouping": "module"},
        {"grouping": "block"},
        {"grouping": "block", "normalization": "cosine"},
    ],
)
def test_single_process_variants(options: dict) -> None:
    case = Case("single", options={"strength_lr": 0.05, **options})
    compare(case, train_toy(case), expected(case))


# What runs on every backend; each key is a test.
CASES: dict[str, dict] = {
    "plain": {},
    "again": {},
    "accumulation": {"accumulation": 2},
    "clipping": {"max_grad_norm": 0.5},
    "both": {"accumulation": 2, "max_grad_norm": 0.5},
    "stored": {"options": {"strength_lr": 0.05, "previous": "stored"}, "max_grad_norm": 0.5},
    "update": {"method": "digrap_update"},
    "blocks": {"options": {"strength_lr": 0.05, "grouping": "block"}},
    "modules": {"options": {"strength_lr": 0.05, "grouping": "module"}},
    "cosine": {"options": {"strength_lr": 0.05, "normalization": "cosine"}},
    "not_normalized": {"options": {"strength_lr": 0.05, "normalization": "none"}},
    "conflicts": {"options": {"strength_lr": 0.05, "hypergradient": "conflicts"}},
    "fixed": {"options": {"fixed_strength": 0.5}, "max_grad_norm": 0.5},
    "fixed_update": {"method": "digrap_update", "options": {"fixed_strength": 0.5}},
    "pcgrad": {"method": "pcgrad", "without_reference": (".gain",)},
    "l2sp": {"method": "l2sp", "max_grad_norm": 0.5},
    "spd": {"method": "spd"},
    "ftp": {"method": "ftp", "max_grad_norm": 0.5},
    "probe": {"method": "linear_probe", "max_grad_norm": 0.1},
    "lp_ft": {"method": "lp_ft", "max_grad_norm": 0.1, "accumulation": 2},
    "lp_ft_fused": {"method": "lp_ft", "options": {**METHODS["lp_ft"], "projection": "fused"}},
    "ftp_accumulation": {"method": "ftp", "accumulation": 2},
    "ftp_large": {"method": "ftp", "large_elements": 4},
    "ftp_stream": {"method": "ftp", "options": {"annealing": 0.5, "reference_placement": "stream"}},
    "ftp_fused": {"method": "ftp", "options": {"annealing": 0.5, "projection": "fused"}, "max_grad_norm": 0.5},
    # Adam's step taken in the hook: small layers together, and large ones (all that a rank holds 4 elements of) one by one.
    "fused": {"options": {"strength_lr": 0.05, "projection": "fused"}, "max_grad_norm": 0.5},
    "fused_large": {"options": {"strength_lr": 0.05, "projection": "fused"}, "max_grad_norm": 0.5, "large_elements": 4},
    "fused_pcgrad": {
        "method": "pcgrad",
        "without_reference": (".gain",),
        "options": {"projection": "fused"},
        "large_elements": 4,
    },
    "fused_update": {"method": "digrap_update", "options": {"strength_lr": 0.05, "projection": "fused"}},
    "stream": {"options": {"strength_lr": 0.05, "reference_placement": "stream"}, "max_grad_norm": 0.5},
    "stream_fused": {
        "options": {"strength_lr": 0.05, "reference_placement": "stream", "projection": "fused"},
        "large_elements": 4,
    },
    "stream_update": {"method": "digrap_update", "options": {"strength_lr": 0.05, "reference_placement": "stream"}},
}
EARLY: dict[str, dict] = {
    "early": {"max_grad_norm": 0.5, "accumulation": 2},
    "early_update": {"method": "digrap_update"},
    "early_fused": {"projection": "fused"},
}
OURS = ("previous", "projection", "reference_placement", "statistics")  # how it is done, not what


def make_cases(backend: str, file: str) -> dict[str, Case]:
    cases = {key: Case(backend, **{"options": METHODS[v.get("method", "digrap")], **v}) for key, v in CASES.items()}
    cases |= {key: replace(cases[key], reference_file=file) for key in cases if "stream" in key}
    if backend == "fsdp2":
        for key, value in EARLY.items():
            early = {"strength_lr": 0.05, "statistics": "backward", "projection": value.get("projection", "separate")}
            rest = {name: v for name, v in value.items() if name != "projection"}
            cases[key] = Case(backend, options=early, large_elements=4, **rest)
    if backend == "zero3":
        # Four elements a sub-group: many of them, each with its own optimizer step.
        cases["sub_groups"] = Case(
            backend, max_grad_norm=0.5, options=METHODS["digrap"], zero={"zero_optimization": {"sub_group_size": 4}}
        )
        cases["engine_clips"] = Case(
            backend, max_grad_norm=0.5, options=METHODS["digrap"], zero={"gradient_clipping": 0.5}
        )
        cases["fused_sub_groups"] = Case(
            backend,
            options={"strength_lr": 0.05, "projection": "fused"},
            zero={"zero_optimization": {"sub_group_size": 4}},
            large_elements=4,
        )
        cases["update_sub_groups"] = Case(
            backend,
            "digrap_update",
            options=METHODS["digrap_update"],
            zero={"zero_optimization": {"sub_group_size": 4}},
        )
        cases["lp_ft_sub_groups"] = Case(
            backend, "lp_ft", options=METHODS["lp_ft"], zero={"zero_optimization": {"sub_group_size": 4}}
        )
        cases["ftp_sub_groups"] = Case(
            backend, "ftp", options=METHODS["ftp"], zero={"zero_optimization": {"sub_group_size": 4}}
        )
    return cases


# By default: a case of each sort on three ranks, whose shards are uneven; the others on two, or with the long tests.
ON_THREE = (
    "plain", "again", "both", "update", "ftp", "stream_fused", "sub_groups", "ftp_sub_groups"
)  # fmt: skip
ON_TWO = (
    "plain", "again", "accumulation", "stored", "pcgrad", "l2sp", "spd", "lp_ft", "early_update", "engine_clips", "fused_update"
)  # fmt: skip


def on_four_ranks(cases: dict[str, Case]) -> dict[str, Case]:
    """A rank's share of the batch is three samples there, which two micro-batches do not divide."""
    return {key: replace(case, accumulation=3 if case.accumulation > 1 else 1) for key, case in cases.items()}


def cases_of(backend: str, ranks: int, rest: bool, file: str) -> dict[str, Case]:
    cases = make_cases(backend, file)
    if ranks == 4:
        return on_four_ranks(cases)
    usual = ON_THREE if ranks == 3 else ON_TWO
    return {key: case for key, case in cases.items() if (key in usual) != rest or key in ("plain", "again")}


PLACES = [
    pytest.param(
        (backend, ranks, rest),
        id=f"{backend}-{ranks}{', the rest' if rest else ''}",
        marks=pytest.mark.slow if rest or ranks == 4 else (),
    )
    for backend in ("ddp", "fsdp2", "zero3")
    for ranks, rest in ((2, False), (3, False), (2, True), (3, True), (4, False))
]


@pytest.fixture(scope="module", params=PLACES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Case], list[dict]]:
    backend, ranks, rest = request.param
    folder = tmp_path_factory.mktemp("reference")
    save_file(make_theta0(make_toy()), folder / "model.safetensors")
    cases = cases_of(backend, ranks, rest, str(folder))
    return backend, cases, run_ranks(ranks, tmp_path_factory.mktemp(backend), train_all, cases)


@pytest.mark.parametrize(
    "key",
    [
        *CASES,
        *EARLY,
        "sub_groups",
        "engine_clips",
        "update_sub_groups",
        "fused_sub_groups",
        "lp_ft_sub_groups",
        "ftp_sub_groups",
    ],
)
def test_equals_one_process(trained: tuple[str, dict[str, Case], list[dict]], key: str) -> None:
    backend, cases, results = trained
    if key not in cases:
        pytest.skip("a case of another backend, or of another number of ranks")
    reference = expected(cases[key])
    for got in results:
        compare(cases[key], got[key], reference)
        assert got[key]["measured_early"] > 0 or not key.startswith("early")
    for got in results[1:]:
        assert got[key]["strength"] == results[0][key]["strength"], "ω differs in its bits between ranks"


def test_one_reduction_a_step(trained: tuple[str, dict[str, Case], list[dict]]) -> None:
    backend, _, results = trained
    for got in results:
        layers = len(got["plain"]["state"]["layers"]["strength"])
        once = [(layers, layers * 4 * 8)] * STEPS
        assert got["plain"]["reductions"] == ([] if backend == "ddp" else once)
        assert got["plain"]["other_collectives"] == []
        if "sub_groups" in got:
            assert got["sub_groups"]["reductions"] == once


def test_runs_repeat_and_ranks_agree_bit_by_bit(trained: tuple[str, dict[str, Case], list[dict]]) -> None:
    """Weights, moments, ω and reports of two runs on one rank; ω on all ranks; under DDP everything on all ranks."""
    backend, cases, results = trained
    for got in results:
        assert got["plain"]["bits"] == got["again"]["bits"]
        for key in cases:
            shared = results[0][key]["bits"]
            for part in ("all", "method", "reports") if backend == "ddp" else ("method", "reports"):
                assert got[key]["bits"][part] == shared[part], f"{key}: {part} differs between ranks"
