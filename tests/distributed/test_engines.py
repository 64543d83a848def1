"""The loop's engines on two ranks: what is wrapped, what precision keeps, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import ViTForImageClassification

from digrap_scale.config import Config
from digrap_scale.models.build import build_model
from digrap_scale.models.groups import build_groups
from digrap_scale.projector import attach
from digrap_scale.sharding.build import build_engine
from tests.distributed.ranks import run_ranks
from tests.models.tiny import make_config, save_vit


def config_of(folder: str, backend: str, wrap: list[str], precision: str, freeze: list[str]) -> Config:
    config = make_config(folder, "classification", freeze=freeze)
    sharding = config.sharding.model_copy(update={"backend": backend, "wrap": wrap, "mixed_precision": precision})
    return config.model_copy(update={"sharding": sharding})


def one_step(folder: str, backend: str, wrap: list[str], precision: str, freeze: list[str]) -> dict[str, Any]:
    """Build, wrap, attach to the pre-trained file, and take a step with rate 1e-3."""
    config = config_of(folder, backend, wrap, precision, freeze)
    built = build_model(config, 3)
    engine = build_engine(
        built.model,
        lambda model: torch.optim.AdamW(build_groups(model, config.optimizer)),
        config,
        torch.device("cpu"),
        dist.get_world_size(),
    )
    before = engine.full_state_dict()
    model, optimizer = engine.attached_to
    projector = attach(model, optimizer, method="digrap", reference=built.checkpoint_folder)
    torch.manual_seed(dist.get_rank())
    with engine.micro_step(last=True):
        pixels = engine.cast(torch.randn(2, 3, 16, 16))
        engine.backward(engine.model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss)
    engine.step()
    return {
        "before": {name: tensor.clone() for name, tensor in before.items()},
        "after": {name: tensor.clone() for name, tensor in engine.full_state_dict().items()},
        "conflict_rate": projector.report.conflict_rate,
        "grad_norm": projector.report.grad_norm,
    }


@pytest.mark.parametrize(
    "backend, wrap, precision",
    [
        ("fsdp2", [], "none"),
        ("fsdp2", ["ViTLayer", "ViTAttention"], "none"),
        ("fsdp2", [], "bfloat16"),
        ("zero3", [], "bfloat16"),
    ],
)
def test_engine(backend: str, wrap: list[str], precision: str, tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    pretrained = ViTForImageClassification.from_pretrained(folder).state_dict()
    frozen = "embeddings"
    first, _ = run_ranks(2, tmp_path / "ranks", one_step, str(folder), backend, wrap, precision, [frozen])
    assert set(first["before"]) == set(pretrained)
    for name, value in pretrained.items():
        assert torch.equal(first["before"][name], value), f"{name} does not start as the checkpoint has it"
        assert torch.equal(first["after"][name], value) == (frozen in name), name
    assert first["conflict_rate"] == 0, "d is 0 before the first step"
    assert first["grad_norm"] > 0
