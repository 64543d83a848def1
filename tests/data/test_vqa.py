"""Question-answering tasks: batches, targets, loss and likelihood, held against plain transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from digrap_scale.config.schema import Config
from digrap_scale.data.tasks.build import build_task
from digrap_scale.errors import ConfigError
from digrap_scale.models.families import Family, build_family
from digrap_scale.models.processors import load_processor
from digrap_scale.types import IGNORED
from tests.models.tiny_vlm import save_tiny_vlm

CLASSES = ["cat", "dog", "fire engine"]


@pytest.fixture(scope="module", params=["llava", "paligemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    config = AutoConfig.from_pretrained(folder)
    return build_family(config, load_processor(folder, config, False), folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def task_of(family: Family, tmp_path: Path, task: str, train: bool, **sections: Any) -> Any:
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    values = {
        "run": {"folder": "unused"},
        "model": {"path": "unused", "task": task},
        "data": {"train": ["unused.tar"], "classes": str(tmp_path / "classes.json"), **sections.get("data", {})},
        "method": {"name": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 1, "global_batch_samples": 4},
        "evaluation": sections.get("evaluation", {}),
    }
    return build_task(Config.model_validate(values), family.processor, None, train, family)


def sample(key: str, images: int = 1, color: int = 0, **meta: Any) -> dict[str, Any]:
    pictures = [Image.new("RGB", (20, 16), (color, 99, 255 - color)) for _ in range(images)]
    return {"key": key, "shard": "x.tar", "images": pictures, "seed": int(key), "meta": meta}


SAMPLES = [
    sample("0", question="what is this ?", answers=["two"] * 3 + ["one"] * 7, color=200),
    sample("1", 2, question="how many ?", answers=["a fire engine"], answer_type="other"),
    sample("2", 0, question="what colour ?", answers=["red", "blue"], question_type="colour", answer_type="other"),
]


def test_batches(family: Family, tmp_path: Path) -> None:
    task = task_of(family, tmp_path, "vqa", True, data={"prompt": "answer en {question}"})
    batch = task.collate(SAMPLES)
    targets = [family.decode(row[row != IGNORED][None])[0] for row in batch.inputs["labels"] if (row != IGNORED).any()]
    assert targets == ["one", "a fire engine", "red"], "the most frequent, the first of equals"
    assert batch.keys == ["0", "1", "2"] and batch.groups == ["", "other", "colour"]
    assert batch.answers == [one["meta"]["answers"] for one in SAMPLES] and batch.labels.tolist() == [0, 0, 0]
    assert "answer en what is this ?" in family.tokenizer.decode(batch.inputs["input_ids"][0])
    assert "labels" not in task_of(family, tmp_path, "vqa", False).collate(SAMPLES).inputs


def test_random_targets_follow_the_seed(family: Family, tmp_path: Path) -> None:
    task = task_of(family, tmp_path, "vqa", True, data={"answer_choice": "random"})
    answers = [str(i) for i in range(10)]
    drawn = [task.target({"seed": seed}, answers) for seed in range(50)]
    assert drawn == [random.Random(f"answer/{seed}").choice(answers) for seed in range(50)] and len(set(drawn)) > 5


@pytest.mark.parametrize("keeps", [False, True])
def test_loss_is_the_mean_over_samples(
    family: Family, model: Any, tmp_path: Path, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each sample the loss that transformers computes for it alone; the blank row of a text batch weighs nothing."""
    monkeypatch.setattr(family, "keeps_logits", keeps)
    task = task_of(family, tmp_path, "vqa", True)
    single = []
    for one in SAMPLES:
        batch = task.collate([one])
        single.append(float(model(**batch.inputs).loss.detach()))
        assert float(task.loss(model, batch).detach()) == pytest.approx(single[-1], rel=1e-4)
    assert float(task.loss(model, task.collate(SAMPLES)).detach()) == pytest.approx(sum(single) / 3, rel=1e-4)


def test_a_batch_of_padding_counts_nowhere(family: Family, model: Any, tmp_path: Path) -> None:
    """A rank without a sample joins forward and backward: its loss is 0, all gradients are there and zeros."""
    task = task_of(family, tmp_path, "vqa", True)
    batch = task.padding(SAMPLES[0])
    assert batch.keys == [] and batch.labels.tolist() == [-1]
    model.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0.0 for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_a_blank_row_reaches_the_tower_and_changes_nothing(family: Family, model: Any, tmp_path: Path) -> None:
    """Its pixels have gradients, zeros: so the tower's layers run backward on every rank."""
    batch = task_of(family, tmp_path, "vqa", True).collate([SAMPLES[2]])
    pixels = batch.inputs["pixel_values"].requires_grad_()
    model.zero_grad()
    task_of(family, tmp_path, "vqa", True).loss(model, batch).backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) == 0.0
    tower = [p for name, p in model.named_parameters() if "vision_tower" in name and "layers.0" in name]
    assert tower and all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in tower)
    model.zero_grad()


@pytest.mark.parametrize(("limit", "fits"), [(40, True), (6, False)])
def test_nothing_is_cut_off(family: Family, tmp_path: Path, limit: int, fits: bool) -> None:
    task = task_of(family, tmp_path, "vqa", True, data={"max_tokens": limit})
    if fits:
        task.collate(SAMPLES)
        return
    with pytest.raises(
        ConfigError, match=r"x.tar: sample 0: \d+ tokens with 1 image\(s\), limit 6; nothing is cut off"
    ):
        task.collate(SAMPLES)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"answers": ["a"]}, "JSON field 'question'"),
        ({"question": "?"}, "'answers' .* is missing"),
        ({"question": "?", "answers": []}, "expected a list of one or more texts"),
        ({"question": "?", "answers": "red"}, "expected a list of one or more texts"),
        ({"question": "?", "answers": ["", " "]}, "expected a list of one or more texts"),
    ],
)
def test_bad_samples_are_named(family: Family, tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"x.tar: sample 7: .*{message}"):
        task_of(family, tmp_path, "vqa", True).collate([sample("7", **meta)])


LABELLED = [sample(str(i), color=80 * i, label=name) for i, name in enumerate(["dog", "fire engine", "cat"])]


def test_classification_trains_towards_the_name(family: Family, tmp_path: Path) -> None:
    batch = task_of(family, tmp_path, "classification-as-vqa", True).collate(LABELLED)
    assert family.decode(batch.inputs["labels"][1][batch.inputs["labels"][1] != IGNORED][None]) == ["fire engine"]
    assert batch.answers == [["dog"], ["fire engine"], ["cat"]] and batch.groups == ["dog", "fire engine", "cat"]
    assert batch.labels.tolist() == [1, 2, 0]
    with pytest.raises(ConfigError, match="sample 3: label 'cta' is not among"):
        task_of(family, tmp_path, "classification-as-vqa", True).collate([sample("3", label="cta")])
    with pytest.raises(ConfigError, match="sample 4: expected one image, found 2"):
        task_of(family, tmp_path, "classification-as-vqa", True).collate([sample("4", 2, label="cat")])


def test_likelihood_is_that_of_the_whole_answer(family: Family, model: Any, tmp_path: Path) -> None:
    """log p(name, end | image, question), one sample and one class at a time, from transformers' own loss."""
    evaluation = {"class_answers": "likelihood"}
    task = task_of(family, tmp_path, "classification-as-vqa", False, evaluation=evaluation)
    assert not task.generates
    with torch.no_grad():
        found = task.logits(model, task.collate(LABELLED))
        for row, one in enumerate(LABELLED):
            for column, name in enumerate(CLASSES):
                encoded = family.encode("What is in the image?", one["images"], name)
                inputs = family.join([encoded], left=False)
                labels = family.supervised([encoded], len(encoded))
                expected = -model(**inputs, labels=labels).loss * (len(encoded) - encoded.prompt_tokens)
                assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-4), (row, name)
    assert found.shape == (3, 3)


def test_generated_class_names(family: Family, tmp_path: Path) -> None:
    task = task_of(family, tmp_path, "classification-as-vqa", False)
    ids = family.tokenizer(["dog", "cat"], add_special_tokens=False)["input_ids"]

    def generate(inputs: dict[str, torch.Tensor], settings: Any) -> torch.Tensor:
        assert not settings.do_sample and settings.use_cache and settings.max_new_tokens == 16
        return torch.cat([inputs["input_ids"], torch.tensor([ids[0], ids[1], ids[1]])], dim=1)

    assert task.generates and task.predict(generate, task.collate(LABELLED)) == ["dog", "cat", "cat"]
