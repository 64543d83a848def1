"""How a run ends that cannot go on: gradients that stay not finite, a full disk, a base that is not the one of then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from digrap_scale.checkpoint.layout import read_state, step_folder
from digrap_scale.errors import CheckpointError, NonFiniteError, SaveError
from digrap_scale.training import loop
from digrap_scale.training.log import read_status
from digrap_scale.types import Batch
from tests.checkpoint.test_save import fill, small_disk
from tests.distributed.resume_runs import run_here, tensors_of, values_of
from tests.models.tiny import save_vit

__all__ = ["small_disk"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def poisoned(bad_steps: set[int], original: Callable[[Any, Batch], Batch]) -> Callable[[Any, Batch], Batch]:
    """Batches of these steps (one forward each) make the gradient NaN."""
    steps = iter(range(1, 100))

    def prepared(engine: Any, batch: Batch) -> Batch:
        batch = original(engine, batch)
        if next(steps) not in bad_steps:
            return batch
        spoilt = {
            name: value * math.nan if value.is_floating_point() else value for name, value in batch.inputs.items()
        }
        return replace(batch, inputs=spoilt)

    return prepared


def test_too_many_skipped_steps_in_a_row(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row end the run with 1; two, and then one, do not."""
    training = {"steps": 8, "max_skipped_steps": 3, "micro_batch_samples": 12}
    monkeypatch.setattr(loop, "prepared", poisoned({2, 3, 5, 6, 7, 8}, loop.prepared))
    values = values_of(model, tmp_path / "run", "single", training=training, checkpoint={"every_steps": 4})
    with pytest.raises(
        NonFiniteError, match=r"step 7: 3 steps in a row had a gradient that is not finite, the last in \S+; lower"
    ) as caught:
        run_here(values)
    assert caught.value.exit_code == 1
    told = read_status(tmp_path / "run") or {}
    assert (told["state"], told["exit_code"], told["step"]) == ("failed", 1, 7) and "3 steps in a row" in told["reason"]
    lines = (tmp_path / "run" / "messages.log").read_text().splitlines()
    skipped = [line for line in lines if "skipped on all ranks: the gradient of" in line]
    assert [int(line.split(": step ")[1].split()[0]) for line in skipped] == [2, 3, 5, 6, 7]
    assert (step_folder(tmp_path / "run", 4) / "COMMITTED").is_file()


@pytest.mark.slow
def test_a_disk_that_fills_while_training(model: Path, small_disk: Path) -> None:
    """Exit 4, told in status.json on that same disk, the earlier checkpoint whole; with room again it goes on."""
    values = values_of(model, small_disk / "run", "single", checkpoint={"every_steps": 2, "keep_last": 1})
    taken = []

    def take(engine: Any, batch: Batch) -> Batch:
        if (step_folder(small_disk / "run", 2) / "COMMITTED").is_file() and not taken:
            fill(small_disk, left=1 << 20)
            taken.append(True)
        return original(engine, batch)

    original, loop.prepared = loop.prepared, take
    try:
        with pytest.raises(SaveError, match=r"disk full saving step-4: it needs .*; step-2 is intact") as caught:
            run_here(values)
    finally:
        loop.prepared = original
    told = read_status(small_disk / "run") or {}
    assert caught.value.exit_code == 4
    assert (told["state"], told["exit_code"]) == ("failed", 4) and "disk full saving step-4" in told["reason"]
    (small_disk / "others").unlink()
    assert len(run_here(values)) == 4
    assert "resumed from step-2" in (small_disk / "run" / "messages.log").read_text()


@pytest.mark.parametrize("kept", [True, False])
def test_frozen_weights(kept: bool, model: Path, tmp_path: Path) -> None:
    """In the checkpoint or not, the run goes on with the same bits, and from another base it does not."""
    sections: dict[str, Any] = {"model": {"freeze": ["embeddings"]}, "checkpoint": {"frozen_weights": kept}}
    values = values_of(model, tmp_path / "run", "single", **sections)
    run_here(values)
    first = step_folder(tmp_path / "run", 3)
    state = read_state(first)
    where = "frozen" if kept else "frozen_elsewhere"
    assert state[where] and all("embeddings" in name for name in state[where])
    assert any(key.startswith("model.vit.embeddings") for key in tensors_of(first)) == kept
    values["run"]["folder"], values["checkpoint"]["resume"] = str(tmp_path / "again"), str(first)
    run_here(values)
    ours, theirs = (tensors_of(step_folder(tmp_path / name, 6)) for name in ("again", "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other = save_vit(tmp_path / "other", classes=16)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "embeddings" in name)
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    values["run"]["folder"], values["model"]["path"] = str(tmp_path / "third"), str(other)
    if kept:  # the reference stays the one of then: the frozen weight itself is what differs
        values["reference"] = {"source": str(model)}
    with pytest.raises(CheckpointError, match="the frozen weight .* differs" if kept else "its reference was"):
        run_here(values)
