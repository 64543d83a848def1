"""The benchmarks run: small sizes, no figure is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / name, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cost_model_has_a_row_for_each_size() -> None:
    """HSDP: with a copy for every 8 GPUs, 1,024 of them step like 8."""
    found = run("cost_model.py", "--shard-gpus", "8").splitlines()
    small, large = (line.split("|")[2:] for line in found if line.startswith(("| 8 ", "| 1024 ")))
    assert small == large


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, "600"])
def test_every_case_of_the_step_is_measured(layers: str | None) -> None:
    options = () if layers is None else ("--layers", layers)
    found = run("step_overhead.py", "--millions", "1", "--rounds", "1", *options).splitlines()
    assert [line.split()[0] for line in found[1:]] == ["separate", "fused", "backward", "stream", "update", "naive"]
    assert all("(floor" in line for line in found[1:4])


@pytest.mark.slow
def test_the_profile_names_every_part() -> None:
    found = run("profile_step.py", "--millions", "1")
    assert "| statistics |" in found and "| projection and AdamW, fused |" in found
