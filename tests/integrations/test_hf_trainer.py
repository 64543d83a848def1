"""transformers' Trainer with one line more equals a plain loop with ``attach``: ω and weights, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from digrap_scale.integrations.hf_trainer import STATE_FILE
from tests.distributed.ranks import run_ranks
from tests.integrations.trainer_runs import train_and_resume
from tests.integrations.vlm_data import STEPS, assert_same, plain_loop, save_pretrained

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pretrained(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="module")
def expected(folder: str) -> dict[str, Any]:
    return plain_loop(folder)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_equals_a_plain_loop(folder: str, expected: dict[str, Any], backend: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    ranks = run_ranks(2, tmp_path / "ranks", train_and_resume, folder, str(output), backend, 2)
    for got in ranks:
        assert got["whole"]["backend"] == backend
        assert_same(got["whole"], expected)
        assert_same(got["resumed"], got["whole"], atol=1e-6)
        lines = [line for line in got["whole"]["history"] if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines[-1]["strength_mean"] > 0 and lines[-1]["conflict_rate"] == expected["conflict_rate"]
    saved = output / f"checkpoint-{STEPS}"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert all("strength_mean" in line for line in history if "loss" in line)
    with safe_open(saved / STATE_FILE, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    of_layers = {key.removeprefix("strength/"): float(v) for key, v in kept.items() if key.startswith("strength/")}
    assert of_layers == pytest.approx(ranks[0]["resumed"]["strength"], abs=1e-6)
