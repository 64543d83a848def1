"""Damaged and left-over samples on several real ranks, with loader processes: nobody waits for a rank that has no batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.data.shards import write_shards
from tests.data.samples import make_samples
from tests.distributed.test_launched import config, launch, rows
from tests.models.tiny import save_vit

RANKS, SAMPLES, BROKEN = 3, 26, {3, 4, 5, 17}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """An epoch of 26 samples in steps of 6: the fifth has 2, which is none for the third rank."""
    samples = make_samples(SAMPLES)
    for number in BROKEN:
        samples[number]["image"] = b"no image"
    write_shards(samples, tmp_path, prefix="p", samples_per_shard=10)
    (tmp_path / "classes.json").write_text(json.dumps(["class 0", "class 1"]))
    data = {
        "train": [f"{tmp_path}/p-*.tar"],
        "classes": f"{tmp_path}/classes.json",
        "workers": 1,
        "remainder": "pad",
        "on_bad_sample": "skip",
    }
    made = config(save_vit(tmp_path / "model", classes=2), tmp_path / "run", data=data, evaluation={"suite": []})
    made["training"] = {"epochs": 2, "global_batch_samples": 6, "micro_batch_samples": 1}
    return made


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_padded_steps_and_skipped_samples(values: dict[str, Any], tmp_path: Path, backend: str) -> None:
    """Two epochs end together on all ranks, with batches of padding for a bad sample alone and for none at all."""
    values["sharding"] = {"backend": backend}
    done = launch(RANKS, values, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = rows(tmp_path / "run")
    assert len(lines) == 10 and all(line["loss"] is not None for line in lines)
    assert lines[-1]["bad_samples"] == 2 * len(BROKEN)  # each once an epoch


@pytest.mark.slow
def test_one_rank_with_too_many_bad_samples_ends_all(values: dict[str, Any], tmp_path: Path) -> None:
    """The others do not wait for it until a time-out."""
    values["sharding"] = {"backend": "fsdp2"}
    values["data"]["max_bad_samples"] = 1
    done = launch(RANKS, values, tmp_path)
    assert done.returncode != 0
    assert "data.max_bad_samples: expected at most 1 bad samples on a rank, found one more: " in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed", status
