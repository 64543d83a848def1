"""Shipped configs fit their models: every regex meets the names of a small model of the same class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from digrap_scale.config.load import parse_config
from digrap_scale.models.check import check_model
from tests.models.tiny import save_beit, save_clip, save_resnet, save_siglip, save_vit, save_vit_mae
from tests.models.tiny_vlm import save_tiny_vlm

CONFIGS = Path(__file__).parents[1] / "configs"
VLM = {
    "paligemma": "paligemma",
    "llava_1_5": "llava",
    "llava_onevision": "llava_onevision",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "smolvlm_": "idefics3",
    "smolvlm2_": "smolvlm",
}
ENCODERS = {
    "clip": save_clip,
    "siglip": save_siglip,
    "vit_mae": save_vit_mae,
    "beit": save_beit,
    "vit_b16": save_vit,
    "resnet": save_resnet,
}


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("vqa/*.yaml"), *CONFIGS.glob("classification/*.yaml")]), ids=lambda path: path.name
)
def test_config_fits_its_model(path: Path, tmp_path: Path) -> None:
    config = parse_config(path.read_text(), path.name)
    folder = tmp_path / "model"
    kind = next((kind for start, kind in VLM.items() if path.name.startswith(start)), None)
    if kind is None:
        save = next(save for start, save in ENCODERS.items() if path.name.startswith(start))
        save(folder)
    else:
        save_tiny_vlm(kind, folder)
        own = json.loads((folder / "config.json").read_text())["model_type"]
        assert own == kind
    small = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    assert check_model(small, 5 if kind is None else None) == []
