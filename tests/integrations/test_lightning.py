"""Lightning with one callback equals a plain loop with ``attach``, also when it goes on from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from tests.distributed.ranks import run_ranks
from tests.integrations.lightning_runs import fit_and_resume
from tests.integrations.vlm_data import assert_same


def check(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(got["whole"], expected)
    assert_same(got["resumed"], got["whole"], atol=1e-6)
    assert got["whole"]["logged"]["digrap/conflict_rate"] == pytest.approx(expected["conflict_rate"])


def test_one_process(folder: str, expected: dict[str, Any], tmp_path: Path) -> None:
    check(fit_and_resume(folder, str(tmp_path), "auto", 1), expected)


@pytest.mark.slow
def test_two_ranks(folder: str, expected: dict[str, Any], tmp_path: Path) -> None:
    for got in run_ranks(2, tmp_path / "ranks", fit_and_resume, folder, str(tmp_path / "output"), "ddp", 2):
        assert got["whole"]["backend"] == "ddp"
        check(got, expected)
