"""TRL's SFTTrainer with one line more equals a plain loop over its batches: ω and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.distributed.ranks import run_ranks
from tests.integrations.trl_runs import head_gradients, refused, sft, sft_by_hand
from tests.integrations.vlm_data import assert_same
from tests.models.tiny_vlm import save_tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_vlm("llava", tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def expected(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sft_by_hand(folder, str(tmp_path_factory.mktemp("by_hand")))


def test_one_process(folder: str, expected: dict[str, Any], tmp_path: Path) -> None:
    got = sft(folder, str(tmp_path), "ddp", 1)
    assert_same(got, expected)
    assert all("conflict_rate" in line for line in got["history"] if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_two_ranks(folder: str, expected: dict[str, Any], backend: str, tmp_path: Path) -> None:
    for got in run_ranks(2, tmp_path / "ranks", sft, folder, str(tmp_path / "output"), backend, 2):
        assert got["backend"] == backend
        assert_same(got, expected)


@pytest.mark.slow
def test_the_fused_head_on_fsdp2_is_refused(folder: str, tmp_path: Path) -> None:
    """As long as its gradient is not the sum over ranks: when this fails, TRL sums it, and the check may go."""
    for message in run_ranks(2, tmp_path / "refused", refused, folder, str(tmp_path / "output")):
        assert "does not sum the LM head's gradient" in message and "compute_loss_func=" in message
    for found in run_ranks(2, tmp_path / "gradients", head_gradients, folder, str(tmp_path / "other")):
        assert not torch.allclose(found["fused"], found["own"], rtol=0.01, atol=0.01 * float(found["own"].abs().max()))
