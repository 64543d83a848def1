"""From benchmarks' own files to the near/far-OOD table with degrees of shift: converter, suite file, one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.training.batches import open_training_data
from digrap_scale.training.evaluate import open_evaluation
from tests.data.benchmarks.files import Files, annotation, picture, question
from tests.models.tiny_vlm import save_tiny_vlm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from convert_vqa import main as convert  # noqa: E402

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
SETS = {"train": "what is this ?", "val": "what is this ?", "reworded": "what colour in the picture ?"}


def vqa_shards(folder: Path, name: str, text: str) -> None:
    files = Files(folder / name)
    asked = [question(i, f"{text} {colour}", i) for i, colour in enumerate(COLOURS)]
    told = [annotation(i, [colour] * 10, i) for i, colour in enumerate(COLOURS)]
    files.write("questions", "q.json", {"data_subtype": "val2014", "questions": asked})
    files.write("annotations", "a.json", {"annotations": told})
    for i, colour in enumerate(COLOURS):
        files.image(f"COCO_val2014_{i:012d}.jpg", picture(colour))
    arguments = ["vqav2", *files.arguments, "--out", str(folder), "--prefix", name, "--samples-per-shard", "2"]
    assert convert(arguments) == 0


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name, text in SETS.items():
        vqa_shards(tmp_path, name, text)
    suite = [
        {"name": "val", "shards": [str(tmp_path / "val-*.tar")], "shift": "id"},
        {"name": "reworded", "shards": [str(tmp_path / "reworded-*.tar")], "shift": "near", "modality": "question"},
        {"name": "again", "shards": [str(tmp_path / "reworded-*.tar")], "shift": "far", "modality": "other"},
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"suite": suite}))
    return {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"path": str(save_tiny_vlm("llava", tmp_path / "model")), "task": "vqa"},
        "data": {"train": [str(tmp_path / "train-*.tar")]},
        "method": {"name": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "sharding": {"backend": "single"},
        "training": {"steps": 1, "global_batch_samples": 2},
        "evaluation": {
            "suite_file": str(tmp_path / "suite.yaml"),
            "shift_degree": {},
            "batch_samples": 4,
            "generation": {"max_new_tokens": 2},
        },
    }


def test_one_command(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["validate", str(file)]) == 0
    assert main(["evaluate", str(file)]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "evaluation"
    result = json.loads((folder / "results.json").read_text())["rows"][0]["result"]
    sets = result["sets"]
    assert [(name, one["shift"], one["modality"]) for name, one in sets.items()] == [
        ("val", "id", "none"),
        ("reworded", "near", "question"),
        ("again", "far", "other"),
    ]
    assert all(set(one["shift_degree"]) == {"vision", "question", "joint"} for one in sets.values())
    val, reworded = sets["val"]["shift_degree"], sets["reworded"]["shift_degree"]
    assert reworded["vision"] == pytest.approx(val["vision"], rel=1e-4), "the images are the same"
    assert reworded["question"] > 1.2 * val["question"]
    assert set(result["shift_correlations"]) == {"vision", "question", "joint"}
    assert "d question" in (folder / "results.md").read_text() and (folder / "shift.png").is_file()


def test_what_is_withheld_has_no_degree(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["hold_out"] = {"fraction": 0.4, "seed": 1}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["evaluate", str(file)]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "evaluation"
    result = json.loads((folder / "results.json").read_text())["rows"][0]["result"]
    validation = result["sets"].pop("validation")
    assert 0 < validation["samples"] < len(COLOURS) and validation["shift_degree"] == {}
    assert all(set(one["shift_degree"]) == {"vision", "question", "joint"} for one in result["sets"].values())
    assert {one["sets"] for one in result["shift_correlations"].values()} == {3}
    assert "withheld from training" in (folder / "results.md").read_text() and (folder / "shift.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.suite_file=", "evaluation.suite=[]"],
            "evaluation.shift_degree: expected nothing without evaluation.suite",
        ),
        (["data.target=caption", "model.task=contrastive"], "it reads the training shards' labels"),
        (["evaluation.shift_degree.train_sample=3"], "did you mean `train_samples`?"),
    ],
)
def test_combinations_that_cannot_be(
    overrides: list[str], message: str, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del values["evaluation"]["generation"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["validate", str(file), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_some_training_shards_are_enough(values: dict[str, Any]) -> None:
    """Whole shards, drawn by the seed, until they hold as many samples as were asked for."""

    def taken(wanted: int | None, seed: int = 0) -> list[str]:
        values["evaluation"]["shift_degree"] = {"train_samples": wanted}
        values["run"]["seed"] = seed
        config = parse_config(yaml.safe_dump(values))
        training = open_evaluation(config, open_training_data(config)).training
        assert training is not None
        return [path.name for path in training.paths]

    every = [f"train-{i:06d}.tar" for i in range(3)]
    assert taken(None) == taken(6) == taken(99) == taken(5) == every
    assert len(taken(1)) == len(taken(2)) == 1 and len(taken(3)) == 2
    assert taken(2) == taken(2) and len({tuple(taken(2, seed)) for seed in range(9)}) > 1
    assert set(taken(2)) < set(taken(3)) < set(every)
