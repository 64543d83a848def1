"""Runs whose data are mixed, damaged or left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.data.shards import write_shards
from digrap_scale.training.batches import count_steps
from tests.data.samples import make_samples
from tests.models.tiny import save_vit


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A mixture of two sources, one of which has three broken images."""
    for name, count, broken in (("a", 12, {3, 4, 7}), ("b", 40, set())):
        samples = make_samples(count)
        for number in broken:
            samples[number]["image"] = b"no image"
        write_shards(samples, tmp_path, prefix=name, samples_per_shard=10)
    (tmp_path / "classes.json").write_text(json.dumps(["class 0", "class 1"]))
    sources = [
        {"name": "a", "shards": [f"{tmp_path}/a-*.tar"], "weight": 1},
        {"name": "b", "shards": [f"{tmp_path}/b-*.tar"], "weight": 3},
    ]
    return {
        "run": {"folder": f"{tmp_path}/run"},
        "model": {"path": str(save_vit(tmp_path / "model", classes=2)), "task": "classification"},
        "data": {"sources": sources, "classes": f"{tmp_path}/classes.json", "order": "global", "on_bad_sample": "skip"},
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"samples": 63, "global_batch_samples": 4, "micro_batch_samples": 1},
        "logging": {"every_steps": 1, "tensorboard": False},
        "checkpoint": {"final": False},
    }


def write(tmp_path: Path, values: dict[str, Any]) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_with_bad_samples(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """15 steps of 4: sources are counted, bad samples too, and a micro-batch of one bad sample changes nothing."""
    assert main(["validate", write(tmp_path, values)]) == 0
    printed = capsys.readouterr().out
    assert "data: a: 12 samples in 2 shards" in printed and "data: 13 steps an epoch of 4 samples" in printed
    assert main(["train", write(tmp_path, values)]) == 0
    lines = rows(tmp_path)
    assert len(lines) == 15
    assert [sum(line["source_samples"].values()) for line in lines] == [4 * step for step in range(1, 16)]
    last = lines[-1]
    skips = [message for message in caplog.messages if message.startswith("sample skipped: ")]
    assert last["bad_samples"] == len(skips) > 0 and last["source_samples"]["a"] < last["source_samples"]["b"]
    assert all(line["loss"] is not None for line in lines)
    again = ["run.overwrite=true", "checkpoint.resume=never", "data.max_bad_samples=0"]
    assert main(["train", write(tmp_path, values), *again]) == 2
    assert "data.max_bad_samples: expected at most 0" in capsys.readouterr().err


def test_an_epoch_of_padded_steps(values: dict[str, Any], tmp_path: Path) -> None:
    """40 samples in steps of 12 (3 micro-batches of 4): three steps and one of 4 samples, as 1, 1 and 2."""
    values["data"] = {"train": [f"{tmp_path}/b-*.tar"], "classes": f"{tmp_path}/classes.json", "remainder": "pad"}
    values["training"] = {"epochs": 2, "global_batch_samples": 12, "micro_batch_samples": 4}
    assert main(["train", write(tmp_path, values)]) == 0
    assert len(rows(tmp_path)) == 8 and all(line["loss"] is not None for line in rows(tmp_path))
    assert "bad_samples" not in rows(tmp_path)[0]


@pytest.mark.parametrize(
    ("training", "remainder", "steps"),
    [
        ({"steps": 7}, "drop", 7),
        ({"epochs": 2}, "drop", 2 * 8),
        ({"epochs": 2}, "pad", 2 * 9),
        ({"epochs": 2}, "repeat", 2 * 9),
        ({"samples": 71}, "drop", 5),
        ({"samples": 3}, "drop", 1),
    ],
)
def test_steps_of_a_run(values: dict[str, Any], training: dict[str, int], remainder: str, steps: int) -> None:
    values["data"] = {"train": ["x.tar"], "classes": "c.json", "remainder": remainder}
    values["training"] = {"global_batch_samples": 12, **training}
    assert count_steps(parse_config(yaml.safe_dump(values)), 101) == steps
