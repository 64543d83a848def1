"""The projector's state travels by parameter name: between backends and world sizes, without a trace in the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import digrap_scale
from digrap_scale.errors import CheckpointError
from tests.distributed.ranks import run_ranks
from tests.distributed.state_runs import METHODS, OPTIONS, Carried, parts, train_part, zero_chain
from tests.distributed.test_equivalence import expected
from tests.distributed.toy import make_theta0, make_toy
from tests.distributed.training_runs import Case, make_optimizer

HALF, STEPS = 10, 20


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Carried]]:
    """What came out of single → zero3 × 3 → fsdp2 × 2 → zero2 × 2 → zero1 × 2, fsdp2 → single and zero1 → single."""
    folder = tmp_path_factory.mktemp("state")
    single = {method: train_part("single", method, 0, HALF) for method in METHODS}
    zero3 = run_ranks(3, folder / "zero3", parts, "zero3", HALF, STEPS, single)[0]
    fsdp2 = run_ranks(2, folder / "fsdp2", parts, "fsdp2", HALF, STEPS, {m: zero3[m]["first"] for m in METHODS})[1]
    zero = run_ranks(2, folder / "zero", zero_chain, HALF, STEPS, {m: fsdp2[m]["first"] for m in METHODS})[1]
    return {
        "fsdp2 to zero2": {m: zero["zero2"][m]["second"] for m in METHODS},
        "zero2 to zero1": {m: zero["zero1"][m]["second"] for m in METHODS},
        "zero1 to single": {m: train_part("single", m, HALF, STEPS, zero["zero1"][m]["first"]) for m in METHODS},
        "single to zero3": {m: zero3[m]["second"] for m in METHODS},
        "zero3 to fsdp2": {m: fsdp2[m]["second"] for m in METHODS},
        "fsdp2 to single": {m: train_part("single", m, HALF, STEPS, fsdp2[m]["first"]) for m in METHODS},
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "chain",
    ["single to zero3", "zero3 to fsdp2", "fsdp2 to single", "fsdp2 to zero2", "zero2 to zero1", "zero1 to single"],
)
def test_equals_straight_training(chains: dict[str, dict[str, Carried]], chain: str, method: str) -> None:
    got = chains[chain][method]
    reference = expected(Case("single", method, steps=STEPS, options=OPTIONS))
    for name, weight in reference.w.items():
        torch.testing.assert_close(got["weights"][name], weight, atol=1e-5, rtol=0)
    for name, omega in reference.omega.items():
        assert got["strength"][name] == pytest.approx(omega, abs=1e-5), name
    assert max(got["strength"].values()) > 0.02
    assert got["projector"]["step"] == STEPS


@pytest.mark.parametrize("method", METHODS)
def test_without_the_state_the_result_is_another(method: str) -> None:
    """So that the tests above mean something."""
    first = train_part("single", method, 0, HALF)
    fresh = {**first, "projector": train_part("single", method, 0, 0)["projector"]}
    got = train_part("single", method, HALF, STEPS, fresh)
    reference = expected(Case("single", method, steps=STEPS, options=OPTIONS))
    assert max(abs(got["strength"][name] - omega) for name, omega in reference.omega.items()) > 1e-3


def attached(method: str = "digrap", **options: Any) -> digrap_scale.Projector:
    model = make_toy()
    return digrap_scale.attach(model, make_optimizer(model), method=method, reference=make_theta0(model), **options)


@pytest.mark.parametrize("method", ["none", "digrap", "digrap_update", "pcgrad", "l2sp", "spd"])
def test_state_of_every_method(method: str) -> None:
    """What is saved can be loaded, and is saved again the same; names and full shapes, plain numbers."""
    options = {"weight": 0.1} if method in ("l2sp", "spd") else {}
    state = (
        train_part("single", method, 0, 3)["projector"]
        if method.startswith("digrap")
        else attached(method, **options).state_dict()
    )
    projector = attached(method, **options)
    projector.load_state_dict(state)
    again = projector.state_dict()
    assert again["method"] == state["method"] == method and again["scalars"] == state["scalars"]
    assert again["step"] == state["step"] == projector.report.step
    for key, layers in state["layers"].items():
        assert all(torch.equal(again["layers"][key][name], value) for name, value in layers.items())
    for key in ("previous", "last_step"):
        assert all(torch.equal(again[key][name], value) for name, value in state[key].items())
    if method == "digrap":
        assert not state["previous"] and len(state["last_step"]) > 5, "AdamW's moments say it all"
    if method == "digrap_update":
        shapes = {name: p.shape for name, p in make_toy().named_parameters() if not name.startswith("head")}
        assert {name: value.shape for name, value in state["previous"].items()}.items() <= shapes.items()
        assert len(state["previous"]) > 5


def test_refuses_another_method() -> None:
    with pytest.raises(CheckpointError) as caught:
        attached("digrap").load_state_dict(attached("digrap_update").state_dict())
    assert str(caught.value) == "method state is of 'digrap_update', expected 'digrap'"


def test_refuses_other_layers() -> None:
    state = attached().state_dict()
    state["layers"]["strength"].pop("blocks.0.gain")
    state["layers"]["strength"]["blocks.7.gain"] = torch.tensor(0.0)
    with pytest.raises(CheckpointError) as caught:
        attached().load_state_dict(state)
    assert str(caught.value) == ("method state: 2 layers differ between the state and the model, first 'blocks.0.gain'")


def test_refuses_other_shapes() -> None:
    state = train_part("single", "digrap_update", 0, 2)["projector"]
    state["previous"]["blocks.0.up.bias"] = torch.zeros(9)
    projector = attached("digrap_update")
    with pytest.raises(CheckpointError) as caught:
        projector.load_state_dict(state)
    assert str(caught.value) == "method state: blocks.0.up.bias: expected shape [7], found [9]"


@pytest.mark.parametrize("missing", ["method", "scalars", "layers", "previous", "last_step", "step"])
def test_refuses_something_else(missing: str) -> None:
    state = attached().state_dict()
    del state[missing]
    with pytest.raises(CheckpointError) as caught:
        attached().load_state_dict(state)
    assert (
        str(caught.value)
        == f"method state: expected the keys method, step, scalars, layers, previous, last_step; {missing} is missing"
    )
