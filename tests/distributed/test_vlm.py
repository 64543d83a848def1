"""PaliGemma, LLaVA and CLIP of transformers, small and random, take steps on sharded weights in bfloat16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.vlm_models import KINDS, STEPS, save_vlm, train_vlms

METHODS = ["digrap", "digrap_update"]
Trained = tuple[str, list[dict[str, Any]]]


@pytest.fixture(
    scope="module", params=["fsdp2", *(pytest.param(zero, marks=pytest.mark.slow) for zero in ("zero2", "zero3"))]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    folders = {kind: str(save_vlm(kind, folder / kind)) for kind in KINDS}
    return request.param, run_ranks(2, folder / "ranks", train_vlms, folders, request.param, METHODS)


def layers_without_gradient(kind: str, names: list[str]) -> set[str]:
    """What the loss never reaches: LLaVA reads the second-last vision layer, PaliGemma does not pool."""
    marks = {
        "llava": ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm."),
        "paligemma": ("vision_tower.head.",),
        "clip": (),
    }[kind]
    return {name for name in names if any(mark in name for mark in marks)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps(trained: Trained, kind: str, method: str) -> None:
    backend, ranks = trained
    got = ranks[0][f"{kind}-{method}"]
    assert all(math.isfinite(loss) for loss in got["losses"]) and got["losses"][-1] < got["losses"][0]
    assert [report["step"] for report in got["reports"]] == list(range(1, STEPS + 1))
    assert not any(report["skipped"] for report in got["reports"])
    assert all(report["grad_norm"] > 0 for report in got["reports"])
    assert max(report["conflict_rate"] for report in got["reports"]) > 0.1

    names = set(got["initial"])
    assert set(got["strength"]) == names, "ω is reported for every layer"
    assert max(got["strength"].values()) > 0, "ω never moved"
    unused = layers_without_gradient(kind, sorted(names))
    assert bool(unused) == (kind != "clip")
    for name in unused:
        assert got["strength"][name] == 0.0
        assert torch.equal(got["weights"][name], got["initial"][name]), name
    moved = [name for name in names - unused if not torch.equal(got["weights"][name], got["initial"][name])]
    assert len(moved) > 0.9 * len(names - unused)
    shapes = {name: list(value.shape) for name, value in got["initial"].items()}
    assert {name: got["shapes"][name] for name in shapes} == shapes, "what would be saved"


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_file(trained: Trained, kind: str) -> None:
    """Through transformers' renaming from file to modules: every layer found, equal to what was loaded."""
    _, ranks = trained
    got = ranks[0][f"{kind}-digrap"]
    assert set(got["references"]) == set(got["initial"])
    for name, reference in got["references"].items():
        assert reference.dtype == torch.bfloat16, name
        assert torch.equal(reference.float(), got["initial"][name]), name


def test_scalars_are_trained(trained: Trained) -> None:
    """CLIP's 0-d logit_scale, which neither fully_shard nor DeepSpeed takes as it is."""
    _, ranks = trained
    for rank in ranks:
        got = rank["clip-digrap"]
        moved = float(got["weights"]["logit_scale"] - got["initial"]["logit_scale"])
        assert got["weights"]["logit_scale"].shape == () and 5e-3 < abs(moved) < 5.1 * 5e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree(trained: Trained, kind: str, method: str) -> None:
    _, ranks = trained
    first, second = (rank[f"{kind}-{method}"] for rank in ranks)
    assert first["strength"] == second["strength"]
    assert first["reports"] == second["reports"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
