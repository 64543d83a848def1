"""Question answering from the command line: validate, train, evaluate what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from digrap_scale.cli import main
from tests.data.samples import encoded, raw_tar, sample_members
from tests.data.vqa_samples import QUESTIONS, vqa_shard
from tests.models.tiny_vlm import save_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def values(model: Path, tmp_path: Path) -> dict[str, Any]:
    shard = str(vqa_shard(tmp_path / "shards" / "train-000000.tar", [1, 2, 0, 1, 1, 1]))
    return {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"path": str(model), "task": "vqa"},
        "data": {"train": [shard]},
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 2, "global_batch_samples": 3},
        "evaluation": {
            "suite": [{"name": "same", "shards": [shard], "shift": "id"}],
            "batch_samples": 4,
            "generation": {"max_new_tokens": 3},
        },
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def write(tmp_path: Path, values: dict[str, Any]) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def result(path: Path) -> Any:
    return json.loads(path.read_text())["rows"][0]["result"]


def test_train_and_evaluate(values: dict[str, Any], model: Path, tmp_path: Path) -> None:
    file, run = write(tmp_path, values), tmp_path / "run"
    assert main(["train", file]) == 0
    found = result(run / "results.json")
    assert found["sets"]["same"]["samples"] == 6
    assert set(found["sets"]["same"]["class_accuracy"]) == {"colour", "what colour"}
    saved, start = load_file(run / "final" / "model.safetensors"), load_file(model / "model.safetensors")
    assert set(saved) == set(start)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (run / "final" / name).read_bytes() == (model / name).read_bytes()
    assert main(["evaluate", file, "--weights", str(run / "final")]) == 0
    assert result(run / "evaluation" / "results.json") == found


BAD = {
    "data.prompt=what": "data.prompt",
    "data.augment=crop": "data.augment",
    "data.question_field=q": "'q' (data.question_field)",
    "data.answers_field=question": f"is {QUESTIONS[0]!r}; expected a list",
    "evaluation.class_answers=likelihood": "evaluation.class_answers",
    "model.task=classification-as-vqa": "data.classes",
    "model.lora={target_modules: [q_proj], dora: true}": "reference.placement",
    "evaluation.generation.max_new_tokens=0": "max_new_tokens",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_configs(override: str, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["reference.placement=stream"] if "dora" in override else []
    assert main(["validate", write(tmp_path, values), override, *extra]) == 2
    assert BAD[override] in capsys.readouterr().err


def test_a_sample_that_is_too_long_ends_the_run(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", write(tmp_path, values), "data.max_tokens=5"]) == 2
    assert "nothing is cut off" in capsys.readouterr().err


def test_several_images_are_refused_where_one_is_needed(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, text), (_, image) = sample_members("k", {"label": "cat"})
    shard = raw_tar(tmp_path / "two-000000.tar", [(name, text), ("k.0.png", image), ("k.1.png", image)])
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    values["data"] = {"train": [str(shard)], "classes": str(tmp_path / "classes.json")}
    values["evaluation"] = {}
    assert main(["validate", write(tmp_path, values), "model.task=classification-as-vqa"]) == 2
    assert "expected one image, found 2" in capsys.readouterr().err


def test_classification_as_vqa(values: dict[str, Any], tmp_path: Path) -> None:
    """Trained with DoRA towards class names, scored by likelihood; the saved adapter scores the same, both ways."""
    colours = {"cat": (255, 0, 0), "fire engine": (0, 0, 255)}
    members = [
        member
        for i, label in enumerate(list(colours) * 3)
        for member in sample_members(f"s{i}", {"label": label}, encoded(colours[label], size=16))
    ]
    shard = str(raw_tar(tmp_path / "shards" / "classes-000000.tar", members))
    (tmp_path / "classes.json").write_text(json.dumps([*colours, "dog"]))
    values["data"] = {"train": [shard], "classes": str(tmp_path / "classes.json"), "augment": "crop"}
    values["model"]["task"] = "classification-as-vqa"
    values["model"]["lora"] = {"rank": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)", "dora": True}
    values["evaluation"]["suite"][0]["shards"] = [shard]
    values["evaluation"]["class_answers"] = "likelihood"
    file, run = write(tmp_path, values), tmp_path / "run"
    assert main(["train", file]) == 0
    found = result(run / "results.json")["sets"]["same"]
    assert found["samples"] == 6 and set(found["class_accuracy"]) == set(colours)
    assert main(["evaluate", file, "--weights", str(run / "final")]) == 0
    assert result(run / "evaluation" / "results.json")["sets"]["same"] == found
    assert main(["evaluate", file, "--weights", str(run / "final"), "evaluation.class_answers=generate"]) == 0
    generated = result(run / "evaluation" / "results.json")["sets"]["same"]
    assert generated["samples"] == 6 and set(generated["class_accuracy"]) == set(colours)


def test_class_names_that_cannot_be_answers(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told where answers are generated and measured, and only there."""
    members = sample_members("s0", {"label": "cat"}, encoded((255, 0, 0), size=16))
    shard = str(raw_tar(tmp_path / "classes-000000.tar", members))
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "two", "a red fire engine", "the Cat.", "2", "?"]))
    values["data"] = {"train": [shard], "classes": str(tmp_path / "classes.json")}
    values["model"]["task"] = "classification-as-vqa"
    values["evaluation"]["suite"][0]["shards"] = [shard]
    file = write(tmp_path, values)
    alike = [
        "data.classes: 'cat' and 'the Cat.' are both 'cat'",
        "'two' and '2' are both '2'",
        "data.classes: '?' is nothing",
    ]
    long = "the class 'a red fire engine' has 4 tokens, found 3, so no generated answer could be right; set it to 4"
    assert main(["validate", file]) == 2
    told = capsys.readouterr().err
    assert all(line in told for line in [*alike, long]) and len(told.strip().splitlines()) >= 4
    assert main(["validate", file, "evaluation.generation.max_new_tokens=4"]) == 2
    told = capsys.readouterr().err
    assert all(line in told for line in alike) and long not in told
    assert main(["validate", file, "evaluation.class_answers=likelihood"]) == 0
    assert main(["validate", file, "evaluation.suite=[]"]) == 0
