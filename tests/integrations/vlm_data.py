"""What every framework's test trains: a small random LLaVA, the same samples in the same order, and a plain loop as yardstick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

import digrap_scale
from tests.distributed.vlm_models import make_vlm, vlm_inputs

STEPS, GLOBAL_BATCH, LEARNING_RATE, MAX_GRAD_NORM = 6, 4, 5e-3, 0.5
EPS = 1e-4  # a key's bias has no gradient but rounding: Adam must not make steps of it
METHOD: dict[str, Any] = {"method": "digrap", "strength_lr": 0.1}


def save_pretrained(folder: Path) -> Path:
    make_vlm("llava").save_pretrained(folder)
    return folder


def load_pretrained(folder: str) -> PreTrainedModel:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    # LLaVA reads the second-last vision layer. What never has a gradient has no optimizer state, which Accelerate misses
    # when it loads that of FSDP2, and DDP wants to be told.
    for name in ("encoder.layers.1", "post_layernorm"):
        model.get_submodule(f"model.vision_tower.{name}").requires_grad_(False)
    return model


def samples(steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    """One after the other, without the batch dimension."""
    found = []
    for seed in range(steps * GLOBAL_BATCH // 2):
        inputs = vlm_inputs("llava", seed)
        found += [{name: tensor[i] for name, tensor in inputs.items()} for i in range(2)]
    return found


def stacked(several: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in several]) for name in several[0]}


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, eps=EPS, weight_decay=0.0
    )


def result(projector: digrap_scale.Projector) -> dict[str, Any]:
    """Full weights and ω by name, the same on every rank. Collective."""
    backend = projector.backend
    return {
        "backend": backend.name,
        "weights": {
            spec.name: backend.gather(layer, weight).clone()
            for layer, (spec, weight) in enumerate(zip(backend.specs, backend.weights(), strict=True))
        },
        "strength": projector.strength(),
        "step": projector.report.step,
        "conflict_rate": projector.report.conflict_rate,
    }


def plain_loop(folder: str, **method: Any) -> dict[str, Any]:
    """One process, whole batches, ``attach`` and nothing else."""
    model = load_pretrained(folder)
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=folder, **{**METHOD, **method})
    data = samples()
    model.train()
    for start in range(0, len(data), GLOBAL_BATCH):
        model(**stacked(data[start : start + GLOBAL_BATCH])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return result(projector)


def assert_same(got: dict[str, Any], expected: dict[str, Any], atol: float = 1e-5) -> None:
    assert got["step"] == expected["step"] == STEPS
    assert set(got["weights"]) == set(expected["weights"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert got["strength"] == {name: pytest.approx(value, abs=atol) for name, value in expected["strength"].items()}
    assert max(expected["strength"].values()) > 0.05, "ω never moved: nothing was compared"
