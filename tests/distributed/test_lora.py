"""Low-rank adapters on every backend: exact against reference zero, and the frozen base costs nothing.

No row of statistics, no reference, no tensor kept, no byte read for it; a head that trains in full beside the adapters
has its reference from the file, by its name there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.lora_runs import (
    HEAD,
    LoraCase,
    lora_loss,
    make_lora,
    train_all_lora,
    train_lora,
    trained_names,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.test_equivalence import TOLERANCE
from tests.distributed.toy import make_batches, make_toy
from tests.distributed.training_runs import DECAY, GLOBAL_BATCH, LR, STEPS, Case, group_of
from tests.plain_digrap import Reference, run

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
QUICK = ("fsdp2", "zero3")
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
# Other ways to set backends up, at two ranks; two copies of a sharded model take four.
WAYS = {
    "ddp accumulation": Case("ddp", accumulation=2),
    "fsdp2 accumulation": Case("fsdp2", accumulation=2),
    "fsdp2 offload": Case("fsdp2", fsdp={"offload": True}),
    "fsdp2 no reshard": Case("fsdp2", fsdp={"reshard": False}),
    "fsdp2 whole": Case("fsdp2", fsdp={"whole": ("blocks.1",)}),
    "zero1 offload": Case("zero1", zero=OFFLOAD),
    "zero2 accumulation": Case("zero2", accumulation=2),
    "zero3 accumulation": Case("zero3", accumulation=2),
    "zero3 offload": Case("zero3", zero=OFFLOAD),
    "zero3 sub-groups": Case("zero3", zero={"zero_optimization": {"sub_group_size": 4}}),
    "hsdp": Case("fsdp2", fsdp={"replicas": 2}),
}
Trained = tuple[dict[str, LoraCase], list[dict[str, Any]]]


def head_reference() -> dict[str, torch.Tensor]:
    """What the file holds: the head's pre-trained weights by their plain names, and nothing of the base."""
    torch.manual_seed(11)
    return {
        name: p.detach() + 0.02 * torch.randn(p.shape) for name, p in make_toy().head.named_parameters(prefix="head")
    }


def make_cases(file: Path) -> dict[str, LoraCase]:
    return {
        "adapters": LoraCase(reference="/nowhere/base.safetensors"),  # not opened: only adapters train
        "update": LoraCase("digrap_update"),
        "head": LoraCase(head=True, reference=str(file)),
        "initial": LoraCase(reference="initial"),
        "ftp": LoraCase("ftp", reference="initial", options={"annealing": 0.5}),
        "l2sp": LoraCase("l2sp", options={"weight": 0.1}),
        "spd": LoraCase("spd", reference="initial", options={"weight": 0.5}),
        "pcgrad": LoraCase("pcgrad", options={}),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "head.safetensors"
    save_file(head_reference(), path)
    return path


def expected(case: LoraCase) -> Reference:
    model = make_lora(case.head)
    names = trained_names(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in names}
    theta0 = {name: torch.zeros_like(w) if case.reference != "initial" else w.clone() for name, w in trained.items()}
    if case.head:
        theta0.update({HEAD + name.removeprefix("head."): value for name, value in head_reference().items()})
    reference = Reference(
        trained,
        theta0,
        case.method,
        lr=lambda name: LR[group_of(name)],
        weight_decay=lambda name: DECAY[group_of(name)],
        **case.options,
    )
    return run(reference, lambda w, batch: lora_loss({**frozen, **w}, batch), make_batches(STEPS, GLOBAL_BATCH))


def check(case: LoraCase, got: dict[str, Any], reference: Reference) -> None:
    assert set(got["weights"]) == set(reference.w) == set(got["rows"]) == set(got["strength"])
    for name, value in reference.w.items():
        torch.testing.assert_close(
            got["weights"][name], value, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        if case.method != "pcgrad":  # which has no ω: its strength is 1
            assert got["strength"][name] == pytest.approx(reference.omega[name], abs=TOLERANCE), name
    if case.method == "ftp":
        assert max(reference.gamma.values()) > 0.02, "the run does not exercise γ"
    elif case.method in ("digrap", "digrap_update"):
        assert max(reference.omega.values()) > 0.02, "the run does not exercise ω"
    assert reference.conflicts > 20 or case.method in ("l2sp", "spd")
    assert all("lora_" in name or name.startswith(HEAD) for name in got["rows"]), "a row for the frozen base"
    if case.head:
        assert sorted(set(got["read"])) == ["head.bias", "head.weight"] and got["opened"] == [case.reference]
    else:
        assert got["read"] == got["opened"] == []
    kept = got["share"] if case.reference == "initial" or case.method == "digrap_update" else got["share_of_head"]
    kept *= 2 if case.method in ("ftp", "spd") else 1  # the reference; directions, or the weights before the step
    assert got["held"] == kept


PLACES = [
    *(
        pytest.param((Case(backend), 2), id=f"{backend}-2", marks=[] if backend in QUICK else pytest.mark.slow)
        for backend in BACKENDS
    ),
    *(
        pytest.param((Case(backend), ranks), id=f"{backend}-{ranks}", marks=pytest.mark.slow)
        for backend in BACKENDS
        for ranks in (3, 4)
    ),
    *(pytest.param((way, 4 if name == "hsdp" else 2), id=name, marks=pytest.mark.slow) for name, way in WAYS.items()),
]


@pytest.fixture(scope="module", params=PLACES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, file: Path) -> Trained:
    way, ranks = request.param
    cases = make_cases(file)
    return cases, run_ranks(ranks, tmp_path_factory.mktemp(way.backend), train_all_lora, way, cases)


KEYS = ("adapters", "update", "head", "initial", "ftp", "l2sp", "spd", "pcgrad")


@pytest.mark.parametrize("key", KEYS)
def test_equals_one_process(trained: Trained, key: str) -> None:
    cases, results = trained
    reference = expected(cases[key])
    for got in results:
        check(cases[key], got[key], reference)
        assert got[key]["strength"] == results[0][key]["strength"], "ω differs in its bits between ranks"


@pytest.mark.parametrize("key", KEYS)
def test_single_process(file: Path, key: str) -> None:
    case = make_cases(file)[key]
    check(case, train_lora(Case("single"), case), expected(case))
