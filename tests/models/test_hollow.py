"""Hollow models: built without memory for what the checkpoint holds, and, filled, bit for bit what from_pretrained gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, CLIPModel, LlavaForConditionalGeneration, PaliGemmaForConditionalGeneration

from digrap_scale.config.schema import Config
from digrap_scale.errors import CheckpointError
from digrap_scale.models.adapters import load_adapter
from digrap_scale.models.build import BuiltModel, build_model
from digrap_scale.models.hollow import hollow_out, load_hollow, renamed
from digrap_scale.reference.initial import open_weights
from digrap_scale.sharding.materialize import materialize
from digrap_scale.types import Slices
from tests.distributed.vlm_models import make_vlm
from tests.models import tiny

FAMILIES: dict[str, tuple[Any, str]] = {
    "clip": (tiny.save_clip, "contrastive"),
    "siglip": (tiny.save_siglip, "contrastive"),
    "dual_encoder": (tiny.save_dual_encoder, "contrastive"),
    "vit": (tiny.save_vit, "classification"),
    "resnet": (tiny.save_resnet, "classification"),
    "lite": (tiny.save_lite, "classification"),
}


def assert_same_models(whole: nn.Module, hollow: nn.Module, slices: Slices) -> None:
    """``hollow`` is filled here; tensors, ties, modes and what trains are equal, bit by bit."""
    materialize(hollow, slices, torch.device("cpu"))
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (whole, hollow))
        assert list(expected) == list(found)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and found[name].requires_grad == value.requires_grad, name
            assert found[name].is_contiguous() and torch.equal(found[name], value), name
    assert list(dict(whole.named_parameters())) == list(dict(hollow.named_parameters())), "ties"
    assert list(whole.state_dict()) == list(hollow.state_dict()), "which buffers are saved"
    assert [m.training for m in whole.modules()] == [m.training for m in hollow.modules()]


def both(config: Config, classes: int | None) -> tuple[BuiltModel, BuiltModel]:
    whole, hollow = build_model(config, classes), build_model(config, classes, open_weights)
    assert hollow.slices is not None
    assert whole.report == hollow.report and whole.new_parameters == hollow.new_parameters
    assert whole.model.name_or_path == hollow.model.name_or_path
    assert whole.model.config.to_dict() == hollow.model.config.to_dict()
    return whole, hollow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_as_from_pretrained_has_it(
    tmp_path: Path, family: str, stored: torch.dtype, dtype: str
) -> None:
    save, task = FAMILIES[family]
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {  # statistics and norms are not left at 0 and 1
        name: (value + torch.rand(value.shape, generator=generator)).to(stored) if value.is_floating_point() else value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    whole, hollow = both(tiny.make_config(tmp_path, task, dtype=dtype), 3 if task == "classification" else None)
    assert all(parameter.is_meta for parameter in hollow.model.parameters())
    assert not any(buffer.is_meta for buffer in hollow.model.buffers())
    assert_same_models(whole.model, hollow.model, hollow.slices)


@pytest.mark.parametrize("case", ["other size", "no head", "ignored"])
def test_a_new_head_starts_as_from_pretrained_draws_it(tmp_path: Path, case: str) -> None:
    (tiny.save_clip if case == "no head" else tiny.save_vit)(tmp_path)
    config = tiny.make_config(tmp_path, "classification", new_head=True, freeze=["embeddings"])
    whole, hollow = both(config, 3 if case == "ignored" else 5)
    real = {name for name, parameter in hollow.model.named_parameters() if not parameter.is_meta}
    assert real == hollow.new_parameters and bool(real) == (case != "ignored")
    assert_same_models(whole.model, hollow.model, hollow.slices)


@pytest.mark.parametrize("new_head", [False, True])
def test_lora_adapts_a_hollow_base(tmp_path: Path, new_head: bool) -> None:
    tiny.save_vit(tmp_path / "vit")
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    config = tiny.make_config(tmp_path / "vit", "classification", lora=lora, new_head=new_head)
    whole, hollow = both(config, 5 if new_head else 3)
    real = {name for name, parameter in hollow.model.named_parameters() if not parameter.is_meta}
    assert {("lora_" in name) or ("classifier" in name and new_head) for name in real} == {True}
    meta_copy = "base_model.model.classifier.modules_to_save.default.weight"
    assert dict(hollow.model.named_parameters())[meta_copy].is_meta == (not new_head)

    with torch.no_grad():
        for parameter in whole.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    whole.model.save_pretrained(tmp_path / "adapter")
    trained = build_model(config, 5 if new_head else 3, open_weights)
    load_adapter(trained.model, tmp_path / "adapter")
    assert_same_models(whole.model, trained.model, trained.slices)
    assert_same_models(build_model(config, 5 if new_head else 3).model, hollow.model, hollow.slices)


CLASSES = {"paligemma": PaliGemmaForConditionalGeneration, "llava": LlavaForConditionalGeneration, "clip": CLIPModel}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CLASSES)
def test_vision_language_models(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Renamed tensors, tied heads (PaliGemma), rotary frequencies, 0-d scales, how to generate."""
    make_vlm(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    whole = CLASSES[kind].from_pretrained(tmp_path, config=config, dtype=dtype)
    with torch.device("meta"):
        twin = CLASSES[kind](config)
    stored = open_weights(tmp_path, twin)
    hollow, info = load_hollow(twin, tmp_path, config, dtype, stored)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    names = hollow_out(hollow, stored, ())
    assert set(names) == set(dict(hollow.named_parameters()))
    if whole.can_generate():
        assert hollow.generation_config.to_dict() == whole.generation_config.to_dict()
    assert_same_models(whole, hollow, renamed(stored.read, names))
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight if kind != "clip" else False
    assert tied == (kind == "paligemma")


@pytest.mark.parametrize("present", ["source", "target", "both", "different"])
def test_tied_weights_in_every_way_that_files_have_them(tmp_path: Path, present: str) -> None:
    """transformers ties to what is there, and does not tie what the file says is different."""
    make_vlm("paligemma").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    head = next(name for name in ("lm_head.weight", "language_model.lm_head.weight") if name not in tensors)
    value = tensors.pop(embedding)
    if present != "target":
        tensors[embedding] = value
    if present != "source":
        tensors[head] = value + 1 if present == "different" else value.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(tmp_path)
    whole = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    with torch.device("meta"):
        twin = PaliGemmaForConditionalGeneration(config)
    stored = open_weights(tmp_path, twin)
    hollow, _ = load_hollow(twin, tmp_path, config, torch.float32, stored)
    names = hollow_out(hollow, stored, ())
    assert_same_models(whole, hollow, renamed(stored.read, names))
    untied = whole.lm_head.weight is not whole.get_input_embeddings().weight
    assert untied == (present == "different")


def test_the_same_errors_before_anything_is_allocated(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vit.layernorm.weight"]
    weights["classifier.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages = []
    for options in ({}, {"open_weights": open_weights}):
        with pytest.raises(CheckpointError) as error:
            build_model(tiny.make_config(tmp_path, "classification"), 3, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "vit.layernorm.weight (missing)" in messages[0]
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:500]), Path.unlink):
        damage(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="weights cannot be loaded") as error:
            build_model(tiny.make_config(tmp_path, "classification"), 3, open_weights)
        assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_that_is_converted_is_loaded_whole_and_says_so(tmp_path: Path) -> None:
    """An old file's merged tensor: its parts are not where the model has them."""
    from transformers import MixtralConfig, MixtralModel

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralModel(MixtralConfig(**size, num_key_value_heads=1, vocab_size=9, num_local_experts=2))
    model.save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    built = build_model(tiny.make_config(tmp_path, "contrastive"), None, open_weights)
    assert built.slices is None and not any(parameter.is_meta for parameter in built.model.parameters())
    (line,) = built.report
    assert "every process loads the whole checkpoint" in line and "merged or split" in line and "experts" in line


def test_other_obstacles_are_named(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    built = build_model(tiny.make_config(tmp_path, "classification"), 3, open_weights)
    assert built.slices is None and not any(parameter.is_meta for parameter in built.model.parameters())
    assert "transformers_weights" in built.report[0]
