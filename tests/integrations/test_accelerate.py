"""Accelerate's loops: one line more, on DDP, FSDP2 and DeepSpeed; ``register_for_checkpointing`` keeps the method's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.integrations.accelerate_runs import loop_and_resume
from tests.integrations.vlm_data import assert_same

pytest.importorskip("accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
def test_equals_a_plain_loop(folder: str, expected: dict[str, Any], backend: str, tmp_path: Path) -> None:
    for got in run_ranks(2, tmp_path / "ranks", loop_and_resume, folder, backend, 2, str(tmp_path / "saved")):
        assert got["whole"]["backend"] == backend
        assert_same(got["whole"], expected)
        assert_same(got["resumed"], got["whole"], atol=1e-6)
