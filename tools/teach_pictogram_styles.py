"""The small VLM's first phase: its image tower learns that a drawing in another style is a drawing of the same thing.

The tower of the foundation model knows the training concepts in the styles of the alignment. Here every drawing is turned
into others (``pictogram_styles.py``), and the tower learns to name concept and class, and to stay near what the foundation
model makes of the drawing as it was (through a copy of its projection that learns, too), which keeps what that knows of concepts
that are not in the training set.
"""

# B tiles, C channels

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as functional
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pictogram_styles as styles
import pictogram_tiles as tiles
import pictograms as pg

from digrap_scale.demo import scenes
from digrap_scale.models.towers.image_processor import MEAN, STD

STYLE_STEPS = 450
STYLE_TILES = 64
TOWER_LEARNING_RATE = 5e-4
HEAD_LEARNING_RATE = 2e-3
TOWER_WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
HEAD_DROPOUT = 0.3
KEEP_WEIGHT = 4.0  # of 1 − cosine to the foundation model's embedding


def teach_styles(
    tower: nn.Module,
    projection: nn.Module,
    packages: Path,
    rate: Callable[[int, int, int], float],
    log: IO[str],
    seed: int,
) -> None:
    """Train ``tower`` in place, BatchNorm's statistics included; it is left in evaluation mode.

    Args:
        tower: pixels [B, 3, H, W] → ``pooler_output`` [B, C].
        projection: the foundation model's, from there to its embeddings; not changed.
        packages: where the pictogram packages are kept.
        rate: (step, steps, warm-up steps) → share of the learning rate.
        log: gets a JSON line every 100 steps.
    """
    split = pg.make_split()
    names = sorted(set(split.label) - split.test)
    kinds = sorted(set(split.label.values()))
    drawn = [
        (concept, tile)
        for style in pg.ALIGNMENT_STYLES
        for concept, tile in tiles.render_tiles(style, packages, set(names)).items()
    ]
    pixels = styles.to_tensor([tile for _, tile in drawn])
    name_of = torch.tensor([names.index(concept) for concept, _ in drawn])
    kind_of = torch.tensor([kinds.index(split.label[concept]) for concept, _ in drawn])
    assert pixels.shape[-1] == scenes.TILE

    def features(batch: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = tower((batch - MEAN) / STD).pooler_output
        return pooled

    tower.eval()
    with torch.no_grad():
        known = torch.cat([functional.normalize(projection(features(part)), dim=1) for part in pixels.split(256)])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    channels = features(pixels[:1]).shape[1]
    heads = nn.ModuleList([copy.deepcopy(projection), nn.Linear(channels, len(names)), nn.Linear(channels, len(kinds))])
    groups = [
        {"params": list(tower.parameters()), "lr": TOWER_LEARNING_RATE},
        {"params": list(heads.parameters()), "lr": HEAD_LEARNING_RATE},
    ]
    peaks = (TOWER_LEARNING_RATE, HEAD_LEARNING_RATE)
    optimizer = torch.optim.AdamW(groups, weight_decay=TOWER_WEIGHT_DECAY)
    tower.train()
    for step in range(STYLE_STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step, STYLE_STEPS, 50)
        rows = torch.randint(len(pixels), (STYLE_TILES,), generator=generator)
        seen = features(styles.place(styles.restyle(pixels[rows], generator), generator))
        dropped = functional.dropout(seen, HEAD_DROPOUT)
        near = (functional.normalize(heads[0](seen), dim=1) * known[rows]).sum(dim=1)
        loss = KEEP_WEIGHT * (1 - near).mean()
        for head, right in ((heads[1], name_of), (heads[2], kind_of)):
            loss = loss + functional.cross_entropy(head(dropped), right[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(
                json.dumps({"phase": "styles", "step": step + 1, "loss": round(loss.item(), 4)}), file=log, flush=True
            )
    tower.eval()
