"""Embeddings out of the model's forward pass are those of its own parts, called one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from digrap_scale.config.schema import LoraConfig
from digrap_scale.errors import ConfigError
from digrap_scale.models.adapters import add_lora
from digrap_scale.models.check import check_model
from digrap_scale.models.embeddings import EMBED, build_embed
from digrap_scale.types import Batch
from tests.distributed.vlm_models import IMAGE_TOKEN, PATCHES, make_vlm
from tests.models.tiny import make_config, save_clip, save_dual_encoder, save_lite, save_resnet, save_siglip, save_vit

LABELS = torch.tensor([1, -1, 0])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pooled(model: Any, name: str) -> torch.Tensor:
    base = model.base_model(pixel_values=PIXELS)
    if name == "vit":
        return base.last_hidden_state[:, 0]
    return base.pooler_output.flatten(1)


@pytest.mark.parametrize("name", ["vit", "resnet", "lite"])
def test_classification(name: str, tmp_path: Path) -> None:
    save = {"vit": save_vit, "resnet": save_resnet, "lite": save_lite}[name]
    model = AutoModelForImageClassification.from_pretrained(save(tmp_path)).eval()
    embed = build_embed("classification", model)
    with torch.no_grad():
        found = embed(model, Batch({"pixel_values": PIXELS}, LABELS))
        assert set(found) == {"vision"}
        torch.testing.assert_close(found["vision"][0], pooled(model, name))
    assert found["vision"][1].tolist() == [True, False, True]
    head = model.classifier
    assert not head._forward_pre_hooks, "a hook was left behind"


def test_adapters_are_seen_through(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(save_vit(tmp_path)).eval()
    with torch.no_grad():
        plain = build_embed("classification", model)(model, Batch({"pixel_values": PIXELS}, LABELS))["vision"][0]
        lora = LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
        adapted = add_lora(model, lora).eval()
        found = build_embed("classification", adapted)(adapted, Batch({"pixel_values": PIXELS}, LABELS))
    torch.testing.assert_close(found["vision"][0], plain)


@pytest.mark.parametrize("save", [save_clip, save_siglip, save_dual_encoder])
def test_contrastive(save: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(save(tmp_path)).eval()
    texts = (
        torch.tensor([[0], [1], [2]]) if save is save_dual_encoder else torch.tensor([[1, 7, 2], [1, 8, 2], [1, 9, 2]])
    )
    batch = Batch({"input_ids": texts, "attention_mask": torch.ones_like(texts), "pixel_values": PIXELS}, LABELS)
    with torch.no_grad():
        found = build_embed("contrastive", model)(model, batch)
        image, text = model.get_image_features(pixel_values=PIXELS), model.get_text_features(input_ids=texts)
    image, text = (getattr(one, "pooler_output", one) for one in (image, text))
    image, text = (torch.nn.functional.normalize(one, dim=-1) for one in (image, text))
    torch.testing.assert_close(found["vision"][0], image)
    torch.testing.assert_close(found["joint"][0][0], torch.cat([image[0], text[1]]))
    torch.testing.assert_close(found["joint"][0][2], torch.cat([image[2], text[0]]))
    assert found["joint"][1].tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["paligemma", "llava"])
def test_generative(kind: str) -> None:
    """Left padding, a sample without an image, a sample of padding, and a blank row below the samples."""
    model = make_vlm(kind).eval()
    image = [IMAGE_TOKEN] * PATCHES
    ids = torch.tensor(
        [
            [0, 0, *image, 5, 6],
            [*image, 7, 8, 9, 10],
            [*image, 7, 8, 9, 10],
            [0, 0, 0, 0, 0, 5, 6, 7],
            [0, 0, *image, 5, 6],
        ]
    )
    batch = Batch({"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.cat([PIXELS, PIXELS[:1]])},
                  torch.tensor([0, 0, -1, 0]))  # fmt: skip
    if kind == "paligemma":
        batch.inputs["token_type_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        found = build_embed("vqa", model)(model, batch)
        features = model.get_image_features(pixel_values=PIXELS)
        features = getattr(features, "pooler_output", features)
        words = model.get_input_embeddings()(torch.tensor([5, 6, 7])).float()
        last = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
    scale = 1.0
    if kind == "paligemma":  # Gemma multiplies its input embeddings; PaliGemma divides the image's by as much
        scale = float(found["question"][0][3].norm() / words.mean(dim=0).norm())
    torch.testing.assert_close(found["question"][0][0], scale * words[:2].mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["question"][0][3], scale * words.mean(dim=0), rtol=1e-4, atol=1e-5)
    of_first = found["vision"][0][0] / torch.stack([one.mean(dim=0) for one in features])[0]
    torch.testing.assert_close(of_first, of_first[0].expand_as(of_first), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["joint"][0][0], last[0, 2:].mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["joint"][0][1], last[1].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert found["vision"][1].tolist() == [True, True, False, False]
    assert found["question"][1].tolist() == found["joint"][1].tolist() == [True, True, False, True]
    assert all(len(vectors) == 4 for vectors, _ in found.values())


def test_what_has_no_embeddings_is_told_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear has no `classifier` whose input could be taken"):
        build_embed("classification", torch.nn.Linear(2, 2))
    config = make_config(save_vit(tmp_path), "classification").model_dump()
    config["evaluation"] = {"suite": [{"name": "a", "shards": ["a.tar"], "shift": "id"}], "shift_degree": {}}
    assert check_model(type(make_config("x", "classification")).model_validate(config), 3) == []


def test_every_task_has_an_entry() -> None:
    from typing import get_args

    from digrap_scale.config.schema import ModelConfig

    assert set(get_args(ModelConfig.model_fields["task"].annotation)) <= set(EMBED)
