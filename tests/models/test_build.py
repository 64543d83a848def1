"""Models from folders: what loads, what starts new, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.models.check import check_model
from tests.models import tiny


def one_line(error: Exception) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1, text
    return text


SAVERS = {
    "clip": (tiny.save_clip, "contrastive"),
    "siglip": (tiny.save_siglip, "contrastive"),
    "dual_encoder": (tiny.save_dual_encoder, "contrastive"),
    "vit": (tiny.save_vit, "classification"),
    "resnet": (tiny.save_resnet, "classification"),
    "lite": (tiny.save_lite, "classification"),
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_family_comes_back_with_its_weights(tmp_path: Path, name: str) -> None:
    save, task = SAVERS[name]
    save(tmp_path)
    built = build_model(tiny.make_config(tmp_path, task), 3 if task == "classification" else None)
    stored = load_file(tmp_path / "model.safetensors")
    loaded = dict(built.model.state_dict())
    compared = [key for key in stored if key in loaded]
    assert len(compared) > 5
    assert all(torch.equal(stored[key], loaded[key]) for key in compared)
    assert built.new_parameters == set()
    assert built.processor is not None and built.checkpoint_folder == tmp_path
    assert (built.tokenizer is not None) == (task == "contrastive")
    assert check_model(tiny.make_config(tmp_path, task), 3) == []


def test_dtype_follows_the_config(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    model = build_model(tiny.make_config(tmp_path, "classification", dtype="bfloat16"), 3).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_head_of_another_size_needs_new_head(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path, classes=3)
    with pytest.raises(ConfigError, match="head of 3 classes, data.classes has 5.*new_head") as error:
        build_model(tiny.make_config(tmp_path, "classification"), 5)
    one_line(error.value)
    config = tiny.make_config(tmp_path, "classification", new_head=True)
    built = build_model(config, 5)
    assert built.new_parameters == {"classifier.weight", "classifier.bias"}
    assert built.model.classifier.weight.shape == (5, 16)
    # the same on every rank, and without touching the caller's random state
    state = torch.get_rng_state()
    again = build_model(config, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(built.model.classifier.weight, again.model.classifier.weight)
    assert build_model(config, 3).new_parameters == set()


def test_a_new_head_has_nothing_to_be_interpolated_with(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path, classes=3)
    config = tiny.make_config(tmp_path, "classification", new_head=True)
    evaluation = config.evaluation.model_copy(update={"interpolate_alphas": [0.5]})
    config = config.model_copy(update={"evaluation": evaluation})
    assert check_model(config, 3) == []
    (problem,) = check_model(config, 5)
    assert "interpolate_alphas: the head starts new (3 classes" in problem


def test_a_classifier_on_a_model_without_a_head(tmp_path: Path) -> None:
    tiny.save_clip(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier.bias \(missing\), classifier.weight.*new_head"):
        build_model(tiny.make_config(tmp_path, "classification"), 2)
    built = build_model(tiny.make_config(tmp_path, "classification", new_head=True), 5)
    assert built.new_parameters == {"classifier.weight", "classifier.bias"}
    stored = load_file(tmp_path / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(built.model.state_dict()[name], stored[name])


def test_missing_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = next(name for name in weights if name.endswith("layernorm.weight"))
    del weights[norm]
    weights["classifier.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        build_model(tiny.make_config(tmp_path, "classification"), 3)
    assert "classifier.bias (checkpoint [7], model [3])" in one_line(error.value)
    assert f"{norm} (missing)" in str(error.value)
    with pytest.raises(CheckpointError, match=norm) as error:
        build_model(tiny.make_config(tmp_path, "classification", new_head=True), 3)
    assert "classifier" not in str(error.value)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (("nowhere", "not a folder"), ("empty", "no config.json")):
        with pytest.raises(ConfigError, match=message) as error:
            build_model(tiny.make_config(tmp_path / path, "classification"), 3)
        assert one_line(error.value) in check_model(tiny.make_config(tmp_path / path, "classification"))[0]
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(ConfigError, match="config.json cannot be used") as error:
        build_model(tiny.make_config(tmp_path / "empty", "classification"), 3)
    one_line(error.value)


def test_pickled_or_damaged_weights_are_refused(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not views into the file
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="weights cannot be loaded") as error:
        build_model(tiny.make_config(tmp_path, "classification"), 3)
    one_line(error.value)
    weights.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights cannot be loaded") as error:
        build_model(tiny.make_config(tmp_path, "classification"), 3)
    one_line(error.value)
    assert "no safetensors weights" in check_model(tiny.make_config(tmp_path, "classification"), 3)[0]


def test_check_names_every_problem(tmp_path: Path) -> None:
    tiny.save_clip(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    groups = {"groups": [{"pattern": "nothing"}]}
    problems = check_model(tiny.make_config(tmp_path, "contrastive", freeze=["vison_model"], optimizer=groups))
    assert len(problems) == 3
    assert "has no tokenizer" in problems[0]
    assert "'vison_model' matches no parameter; nearest: vision_model" in problems[1]
    assert "optimizer.groups.0.pattern" in problems[2]


def test_remote_code_stays_off(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(model_type="foreign", auto_map={"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="config.json cannot be used"):
        build_model(tiny.make_config(tmp_path, "classification"), 3)
    assert not (tmp_path / "ran").exists()
