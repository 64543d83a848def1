"""How far each layer has gone from its reference."""

from __future__ import annotations

import torch

from digrap_scale.projector.projector import Projector
from digrap_scale.types import ShardView


@torch.no_grad()
def layer_drift(projector: Projector) -> dict[str, float]:
    """‖θ − θ₀‖ (L2) of every layer that has a reference, by name. One pass over the shards, one all-reduce: collective."""
    backend = projector.backend
    views = {
        layer: ShardView(spec, weight, None)
        for layer, (spec, weight) in enumerate(zip(backend.specs, backend.weights(), strict=True))
    }
    projected = [layer for layer, has_reference in enumerate(projector._projected) if has_reference]
    squares_LK = torch.zeros(len(views), 1, dtype=torch.float64, device=views[0].weight.device)
    for pieces, parts in projector._walk(views, projected):
        for piece, part in zip(pieces, parts, strict=True):
            away = part.weight.float() if part.reference is None else part.weight.float() - part.reference.float()
            squares_LK[piece.layer] += away.double().square().sum()
    backend.reduce_(squares_LK)
    drift_L = squares_LK.sqrt().flatten().tolist()
    return {backend.specs[layer].name: drift_L[layer] for layer in projected}
