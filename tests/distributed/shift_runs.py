"""The degree of shift on sharded models, as every rank runs it; and the same in one process, in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, CLIPModel, LlavaForConditionalGeneration, ViTForImageClassification

from digrap_scale.config.schema import Config
from digrap_scale.evaluation.shift import Moments, Whitened, measure_shift
from digrap_scale.evaluation.suite import evaluation_mode
from digrap_scale.models.embeddings import build_embed
from digrap_scale.sharding.build import build_engine
from digrap_scale.types import Batch
from tests.distributed.vlm_models import IMAGE_TOKEN, PATCHES

KINDS: dict[str, tuple[Any, str]] = {
    "clip": (CLIPModel, "contrastive"),
    "llava": (LlavaForConditionalGeneration, "vqa"),
    "vit": (ViTForImageClassification, "classification"),
}
BATCH = 4
# Samples of the training set and of two test sets on each rank: rank 1 has fewer, and of `far` none at all.
SHARES = {"train": (18, 13), "near": (7, 3), "far": (5, 0)}


def load(kind: str, folder: str) -> Any:
    return KINDS[kind][0].from_pretrained(folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32)


def shift_samples(kind: str, name: str) -> Batch:
    """All samples of a set; `far` is brighter and speaks in other words."""
    count, seed = sum(SHARES[name]), sorted(SHARES).index(name)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 16, 16, generator=generator) * (3 if name == "far" else 1)
    if kind == "clip":
        texts = torch.tensor([[3, 4, 2], [5, 6, 2], [7, 8, 2]])
        inputs = {"input_ids": texts, "attention_mask": torch.ones_like(texts), "pixel_values": pixels}
        return Batch(inputs, torch.randint(3, (count,), generator=generator))
    if kind == "vit":
        return Batch({"pixel_values": pixels}, torch.zeros(count, dtype=torch.int64))
    words = torch.randint(3, 20 if name == "far" else IMAGE_TOKEN, (count, 5), generator=generator)
    ids = torch.cat([torch.full((count, PATCHES), IMAGE_TOKEN), words], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Batch(inputs, torch.zeros(count, dtype=torch.int64))


def part(kind: str, whole: Batch, start: int, stop: int) -> Batch:
    assert whole.labels is not None
    inputs = {
        name: tensor if kind == "clip" and name != "pixel_values" else tensor[start:stop]
        for name, tensor in whole.inputs.items()
    }
    return Batch(inputs, whole.labels[start:stop])


def rank_batches(kind: str, name: str, rank: int) -> list[Batch]:
    """This rank's batches, padded with batches that do not count to as many as rank 0 has."""
    whole, shares = shift_samples(kind, name), SHARES[name]
    first = sum(shares[:rank])
    found = [
        part(kind, whole, first + at, first + min(at + BATCH, shares[rank])) for at in range(0, shares[rank], BATCH)
    ]
    while len(found) < -(-max(shares) // BATCH):
        padding = part(kind, whole, 0, 1)
        found.append(Batch(padding.inputs, torch.tensor([-1])))
    return found


def measure_on_rank(folders: dict[str, str], backends: list[str]) -> dict[str, Any]:
    """Backend and kind → degrees of shift, as this rank has them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"moments": _moments(rank)}
    for backend in backends:
        for kind, folder in folders.items():
            config = Config.model_validate(
                {
                    "run": {"folder": "unused"},
                    "model": {"path": "unused", "task": "contrastive"},
                    "data": {"train": ["unused.tar"], "classes": "unused.json"},
                    "method": {"name": "none"},
                    "optimizer": {"learning_rate": 1e-3},
                    "sharding": {"backend": backend},
                    "training": {"steps": 1, "global_batch_samples": ranks},
                }
            )
            engine = build_engine(
                load(kind, folder),
                lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
                config,
                torch.device("cpu"),
                ranks,
            )
            sets = {name: rank_batches(kind, name, rank) for name in SHARES}
            training = sets.pop("train")
            embed = build_embed(KINDS[kind][1], engine.module)
            with engine.inference(), evaluation_mode(engine.model):
                degrees = measure_shift(
                    engine.model, embed, training, sets, device="cpu", reduce_=lambda t: dist.all_reduce(t)
                )
            found[f"{backend}-{kind}"] = {"of": degrees.of, "notes": degrees.notes}
    return found


def moment_vectors() -> tuple[torch.Tensor, tuple[int, int]]:
    """[N, p] float64 far from 0, and how many of them each rank has."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(60, 12, generator=generator, dtype=torch.float64) * 3 + 1000, (53, 7)


def _moments(rank: int) -> dict[str, torch.Tensor]:
    vectors, shares = moment_vectors()
    moments = Moments(vectors.shape[1])
    for batch in vectors.split(shares)[rank].split(5):
        moments.add(batch)
    moments.reduce_(lambda tensor: dist.all_reduce(tensor))
    return {"mean": moments.mean, "scatter": moments.scatter, "distances": Whitened(moments).distances(vectors + 1)}


def reference_shift(kind: str, folder: str) -> dict[str, dict[str, float]]:
    """Whole sets in one batch, the unwrapped model's own parts, numpy."""
    model = load(kind, folder).eval()
    vectors = {name: _vectors(kind, model, shift_samples(kind, name)) for name in SHARES}
    train = vectors.pop("train")
    return {name: {key: distance(train[key], found[key]) for key in found} for name, found in vectors.items()}


@torch.no_grad()
def _vectors(kind: str, model: Any, batch: Batch) -> dict[str, np.ndarray]:
    pixels = batch.inputs["pixel_values"]
    if kind == "clip":
        image, text = model.get_image_features(pixels), model.get_text_features(batch.inputs["input_ids"])
        image, text = (getattr(one, "pooler_output", one) for one in (image, text))
        image, text = (torch.nn.functional.normalize(one, dim=-1) for one in (image, text))
        return {"vision": _double(image), "joint": _double(torch.cat([image, text[batch.labels]], dim=1))}
    if kind == "vit":
        return {"vision": _double(model.vit(pixels).last_hidden_state[:, 0])}
    features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    words = model.get_input_embeddings()(batch.inputs["input_ids"][:, PATCHES:])
    last = model.model(**batch.inputs).last_hidden_state
    return {
        "vision": _double(torch.stack([one.mean(dim=0) for one in features])),
        "question": _double(words.mean(dim=1)),
        "joint": _double(last.mean(dim=1)),
    }


def _double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def distance(train: np.ndarray, test: np.ndarray) -> float:
    count, size = train.shape
    covariance = np.cov(train.T, bias=True)
    trace, square = np.trace(covariance), np.sum(covariance**2)
    rho = min(1.0, (square + trace**2) / ((count + 1) * (square - trace**2 / size)))
    inverse = np.linalg.inv((1 - rho) * covariance + rho * trace / size * np.eye(size))
    centred = test - train.mean(axis=0)
    return float(np.mean([np.sqrt(z @ inverse @ z) for z in centred]))
