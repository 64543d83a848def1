"""Attention kernels and gradient checkpointing: the same gradients, computed otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from digrap_scale.config import Config
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.models.check import check_model
from digrap_scale.models.forward import set_forward
from tests.models import tiny


def changed(folder: Path, checkpointing: bool = False, **model: Any) -> Config:
    config = tiny.make_config(folder, "classification", **model)
    return config.model_copy(
        update={"training": config.training.model_copy(update={"gradient_checkpointing": checkpointing})}
    )


def gradients(config: Config) -> tuple[dict[str, torch.Tensor], int]:
    """Of one step, and the bytes that autograd kept for it outside of what is computed again."""
    model: Any = build_model(config, 3).model
    set_forward(model, config)
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept)


def test_layers_are_computed_again(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    expected, whole = gradients(changed(tmp_path))
    found, kept = gradients(changed(tmp_path, checkpointing=True))
    assert kept < whole / 2
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_attention_kernels(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    expected, _ = gradients(changed(tmp_path, attention="sdpa"))
    found, _ = gradients(changed(tmp_path, attention="eager"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path / "vit")
    tiny.save_resnet(tmp_path / "resnet")
    (problem,) = check_model(changed(tmp_path / "vit", attention="flash_attention_2"), 3)
    assert problem.startswith("model.attention: flash_attention_2 cannot be had: ")
    (problem,) = check_model(changed(tmp_path / "resnet", checkpointing=True), 3)
    assert problem.startswith(
        "training.gradient_checkpointing: ResNetForImageClassification cannot compute its layers again"
    )
    with pytest.raises(ConfigError, match="training.gradient_checkpointing"):
        set_forward(
            build_model(tiny.make_config(tmp_path / "resnet", "classification"), 3).model, changed(tmp_path, True)
        )
