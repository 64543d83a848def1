"""Small random vision-language models of transformers' real classes, their inputs, and a few steps on a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)

import digrap_scale
from digrap_scale.config.schema import Config
from digrap_scale.sharding.build import build_engine

IMAGE_TOKEN, VOCABULARY, PATCHES, WORDS = 59, 60, 4, 5
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ("paligemma", "llava", "clip")
STEPS = 5


def make_vlm(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if kind == "paligemma":
        return PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(
                vision_config={"model_type": "siglip_vision_model", "projection_dim": 16, **VISION},
                text_config={"model_type": "gemma", **TEXT},
                image_token_index=IMAGE_TOKEN,
                projection_dim=16,
                hidden_size=16,
            )
        )
    if kind == "llava":
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
                text_config={"model_type": "llama", **TEXT},
                image_token_index=IMAGE_TOKEN,
            )
        )
    text = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
    return CLIPModel(CLIPConfig(vision_config=dict(VISION), text_config=text, projection_dim=8))


def save_vlm(kind: str, folder: Path) -> Path:
    """Saved in bfloat16, as pre-trained weights often are."""
    make_vlm(kind).to(torch.bfloat16).save_pretrained(folder)
    return folder


def vlm_inputs(kind: str, rank: int) -> dict[str, torch.Tensor]:
    """A batch of two samples, different on every rank."""
    generator = torch.Generator().manual_seed(20 + rank)
    words = torch.randint(3, IMAGE_TOKEN, (2, WORDS), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if kind == "clip":
        words[:, -1] = TEXT["eos_token_id"]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": pixels}
    ids = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), words], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100),
    }
    if kind == "paligemma":
        inputs["token_type_ids"] = (ids != IMAGE_TOKEN).long()
    return inputs


def vlm_config(backend: str, ranks: int) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": "unused"},
            "model": {"path": "unused", "task": "contrastive"},
            "data": {"train": ["unused.tar"], "target": "caption"},
            "method": {"name": "digrap"},
            "optimizer": {"learning_rate": 5e-3},
            "sharding": {"backend": backend, "mixed_precision": "bfloat16"},
            "training": {"steps": STEPS, "global_batch_samples": 2 * ranks},
            "evaluation": {"at_end": False},
        }
    )


def train_vlm(folder: str, kind: str, backend: str, method: str) -> dict[str, Any]:
    """Five steps; what is returned is equal on all ranks if the ranks agree."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    cls = {"paligemma": PaliGemmaForConditionalGeneration, "llava": LlavaForConditionalGeneration, "clip": CLIPModel}[
        kind
    ]
    model = cls.from_pretrained(folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32)
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = build_engine(
        model,
        lambda module: torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0, fused=True),
        vlm_config(backend, ranks),
        torch.device("cpu"),
        ranks,
    )
    wrapped, optimizer = engine.attached_to
    projector = digrap_scale.attach(wrapped, optimizer, method=method, reference=folder, strength_lr=0.1)
    backend_ = projector.backend
    references = {
        spec.name: backend_.gather(layer, projector._reference.slices_L[layer])
        for layer, spec in enumerate(backend_.specs)
        if projector._reference.slices_L[layer] is not None
    }
    engine.model.train()
    losses, reports = [], []
    inputs = {
        name: engine.cast(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in vlm_inputs(kind, rank).items()
    }
    if kind == "clip":
        inputs["return_loss"] = True
    for _ in range(STEPS):
        with engine.micro_step(last=True):
            loss = engine.model(**inputs).loss
            engine.backward(loss)
        engine.step()
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
        reports.append(vars(projector.report).copy())
    return {
        "initial": initial,
        "references": references,
        "weights": {
            spec.name: backend_.gather(layer, weight)
            for layer, (spec, weight) in enumerate(zip(backend_.specs, backend_.weights(), strict=True))
        },
        "shapes": {name: list(tensor.shape) for name, tensor in engine.full_state_dict().items()},
        "strength": projector.strength(),
        "losses": losses,
        "reports": reports,
    }


def train_vlms(folders: dict[str, str], backend: str, methods: list[str]) -> dict[str, Any]:
    """Every kind of model with every method, in the same processes."""
    return {
        f"{kind}-{method}": train_vlm(folders[kind], kind, backend, method) for kind in folders for method in methods
    }
