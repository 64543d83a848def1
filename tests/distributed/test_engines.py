"""The loop's engines on two ranks: what is wrapped, what precision keeps, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import ViTForImageClassification

from digrap_scale.config import Config
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.models.groups import build_groups
from digrap_scale.projector import attach
from digrap_scale.sharding.build import build_engine
from tests.distributed.ranks import run_ranks
from tests.distributed.training_runs import allow_float16
from tests.models.tiny import make_config, save_vit


def config_of(
    folder: str,
    backend: str,
    wrap: list[str],
    precision: str,
    freeze: list[str],
    more: dict[str, Any] | None = None,
) -> Config:
    config = make_config(folder, "classification", freeze=freeze)
    sharding = {"backend": backend, "wrap": wrap, "mixed_precision": precision, **(more or {})}
    return Config.model_validate({**config.model_dump(), "sharding": sharding})


def one_step(
    folder: str,
    backend: str,
    wrap: list[str],
    precision: str,
    freeze: list[str],
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build, wrap, attach to the pre-trained file, and take a step with rate 1e-3."""
    config = config_of(folder, backend, wrap, precision, freeze, more)
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
    while projector.report.step == 0:  # the first loss scales of float16 overflow
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


# backend, precision, more of the sharding section
ZERO = [
    ("zero1", "bfloat16", {}),
    ("zero2", "none", {"offload": "cpu"}),
    ("zero2", "float16", {}),
    ("zero3", "float16", {"offload": "cpu", "zero": {"sub_group_elements": 500, "persistence_threshold_elements": 0}}),
]


def zero_steps(folder: str, freeze: list[str]) -> dict[str, Any]:
    allow_float16()
    results = {
        f"{backend}-{precision}": one_step(folder, backend, [], precision, freeze, more)
        for backend, precision, more in ZERO
    }
    return {**results, "scalars": {backend: scaled_step(backend) for backend in ("zero1", "zero2")}}


def test_zero_engines(tmp_path: Path) -> None:
    """Checkpoint values in the masters, whatever the weights are rounded to; frozen ones stay; all come out whole."""
    folder, frozen = save_vit(tmp_path / "vit"), "embeddings"
    pretrained = ViTForImageClassification.from_pretrained(folder).state_dict()
    first, second = run_ranks(2, tmp_path / "ranks", zero_steps, str(folder), [frozen])
    for backend, precision, _ in ZERO:
        got = first[f"{backend}-{precision}"]
        assert set(got["before"]) == set(got["after"]) == set(pretrained)
        for name, value in pretrained.items():
            assert torch.equal(got["before"][name], value), f"{name} does not start as the checkpoint has it"
            assert torch.equal(got["after"][name], value) == (frozen in name), name
        assert got["conflict_rate"] == 0 and 0 < got["grad_norm"] < 100
    scales = first["scalars"]["zero1"]
    assert first["scalars"] == second["scalars"] and first["scalars"]["zero2"] == scales
    assert scales[0] == 2.0 > scales[1] > scales[2]


def scaled_step(backend: str) -> list[float]:
    """A 0-d parameter (CLIP's logit_scale) before and after two steps, and whether it is 0-d still."""
    config = config_of("unused", backend, [], "none", [])
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.scale = torch.nn.Parameter(torch.tensor(2.0))
    engine = build_engine(
        model, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), config, torch.device("cpu"), dist.get_world_size()
    )
    projector = attach(engine.attached_to[0], None, method="digrap", reference="zero")
    seen = [float(engine.full_state_dict().get("scale", 2.0))]
    for _ in range(2):
        with engine.micro_step(last=True):
            engine.backward((engine.model(torch.ones(2, 3)).square().mean() + 1) * engine.model.module.scale)
        engine.step()
        assert engine.model.module.scale.ndim == 0
        seen.append(float(engine.model.module.scale.detach()))
    assert projector.backend.specs[-1].shape == () or projector.backend.specs[0].shape == ()
    return seen


def test_float16_where_the_device_has_none(tmp_path: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device computes in float16")
    config = config_of(str(save_vit(tmp_path / "vit")), "zero2", [], "float16", [])
    with pytest.raises(ConfigError, match="does not compute in float16; use bfloat16"):
        build_engine(torch.nn.Linear(2, 2), torch.optim.SGD, config, torch.device("cpu"), 1)
