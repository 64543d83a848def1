"""The degree of shift on FSDP2's and ZeRO-3's sharded models, ranks of unequal shares, equals one process's."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.shift_runs import KINDS, distance, measure_on_rank, moment_vectors, reference_shift
from tests.distributed.vlm_models import save_vlm
from tests.models.tiny import save_vit

BACKENDS = ["fsdp2", "zero3"]
Measured = tuple[dict[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("shift")
    folders = {kind: str((save_vit if kind == "vit" else partial(save_vlm, kind))(folder / kind)) for kind in KINDS}
    return folders, run_ranks(2, folder / "ranks", measure_on_rank, folders, BACKENDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_one_process(measured: Measured, backend: str, kind: str) -> None:
    folders, ranks = measured
    found, expected = ranks[0][f"{backend}-{kind}"], reference_shift(kind, folders[kind])
    assert found == ranks[1][f"{backend}-{kind}"], "ranks disagree"
    assert found["notes"] == []
    for name, degrees in expected.items():
        # The forward is float32; what comes after it is exact (tests/evaluation/test_shift.py).
        assert found["of"][name] == pytest.approx(degrees, rel=1e-4)
    assert found["of"]["far"]["vision"] > found["of"]["near"]["vision"]


def test_streamed_over_ranks_is_one_pass(measured: Measured) -> None:
    _, ranks = measured
    vectors, _ = moment_vectors()
    whole = vectors.numpy()
    for rank in ranks:
        found = rank["moments"]
        assert torch.equal(found["scatter"], ranks[0]["moments"]["scatter"]), "ranks disagree"
        np.testing.assert_allclose(found["mean"], whole.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found["scatter"], np.cov(whole.T, bias=True) * len(whole), rtol=1e-10, atol=1e-9)
        assert float(found["distances"].mean()) == pytest.approx(distance(whole, whole + 1), rel=1e-10)
