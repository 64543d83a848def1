"""What ``validate`` says about data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.config.schema import Config
from digrap_scale.data.check import check_data
from digrap_scale.data.classes import load_classes
from digrap_scale.data.shards import write_shards
from digrap_scale.errors import ConfigError
from tests.data.samples import make_samples, raw_tar, sample_members


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A config without a problem."""
    write_shards(make_samples(4), tmp_path, prefix="train", samples_per_shard=2)
    write_shards(make_samples(2), tmp_path, prefix="test", samples_per_shard=2)
    (tmp_path / "classes.json").write_text(json.dumps(["class 0", "class 1"]))
    return {
        "run": {"folder": "unused"},
        "model": {"path": "unused", "task": "contrastive"},
        "data": {"train": [f"{tmp_path}/train-*.tar"], "classes": f"{tmp_path}/classes.json"},
        "method": {"name": "none"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 1, "global_batch_samples": 4},
        "evaluation": {"suite": [{"name": "t", "shards": [f"{tmp_path}/test-000000.tar"], "shift": "id"}]},
    }


def problems(raw: dict[str, Any]) -> list[str]:
    found = check_data(Config.model_validate(raw))
    assert all(len(problem.splitlines()) == 1 for problem in found)
    return found


def test_sound_data_has_no_problem(raw: dict[str, Any]) -> None:
    assert problems(raw) == []
    raw["data"]["target"] = "caption"
    assert problems(raw) == []


def test_all_problems_come_at_once(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"].update(train=["nowhere-*.tar", "pipe:ls"], classes="no.json")
    raw["evaluation"]["suite"][0]["shards"] = [f"{tmp_path}/test-{{000000..000001}}.tar"]
    found = problems(raw)
    assert len(found) == 4
    assert found[0].startswith("data.classes: no.json cannot be read")
    assert found[1].startswith("data.train: shards 'nowhere-*.tar': no file matches")
    assert found[2].startswith("data.train: shards 'pipe:ls': only local files")
    assert found[3].startswith("evaluation.suite.0 (t): shards ") and "test-000001.tar" in found[3]


def test_labels_meet_classes(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(["class 0"]))
    found = problems(raw)
    assert len(found) == 2
    assert (
        "train-000000.tar: sample s000001: label 'class 1' is not among the 1 names of data.classes (nearest:"
        in found[0]
    )


def test_captions_and_broken_samples(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"].update(target="caption", caption_field="text")
    assert "JSON field 'text' (data.caption_field) is missing" in problems(raw)[0]
    raw_tar(tmp_path / "bad.tar", sample_members("k", image=b"x"))
    raw["data"]["train"] = [f"{tmp_path}/bad.tar"]
    assert "bad.tar: sample k: the image cannot be decoded" in problems(raw)[0]


def test_a_suite_needs_classes(raw: dict[str, Any]) -> None:
    raw["data"].update(target="caption", classes=None)
    assert problems(raw) == [
        "data.classes: needed by evaluation.suite: a JSON list of names or object of name → prompt"
    ]


def test_classes_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"b": "a photo of b", "a": "a photo of a"}')
    assert load_classes(path).names == ("b", "a")
    assert load_classes(path).prompts == ("a photo of b", "a photo of a")
    path.write_text('["y", "x"]')
    assert load_classes(path).names == load_classes(path).prompts == ("y", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "not empty"),
        ("{}", "not empty"),
        ("3", "expected an object"),
        ('[["a", "b"]]', "expected an object"),
        ('["a", 1]', "expected an object"),
        ('{"a": 1}', "expected an object"),
        ('[{"a": "b"}]', "expected an object"),
        ('["a", "b", "a"]', "'a' comes more than once"),
        ('{"a": "x", "a": "y"}', "'a' comes more than once"),
    ],
)
def test_bad_classes_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="c.json") as error:
        load_classes(path)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
