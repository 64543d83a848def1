"""Drawings turned into other styles, so that pre-training does not rest on the styles that it sees.

One pass over tiles [B, 3, H, W] in 0 … 1, on white; all choices are drawn from a generator.
"""

# B tiles

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

# Share of each kind of change. The last six make greys, lines, two tones and shapes out of colour.
SHARES = {
    "as it is": 3.0,
    "other colours": 1.5,
    "colours with outlines": 1.0,
    "pale colours with outlines": 1.5,
    "greys": 1.0,
    "outlines": 2.0,
    "two tones": 1.5,
    "two tones, inverted": 1.0,
    "shape with inner lines": 1.5,
}
PAPER = 0.93  # a pixel all of whose channels are lighter is no part of the drawing


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def grey(tiles: torch.Tensor) -> torch.Tensor:
    """Luminance (ITU-R BT.601), [B, 1, H, W]."""
    return (tiles * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def restyle(tiles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each tile in a way of ``SHARES``: [B, 3, H, W]."""
    count = len(tiles)
    framed = functional.pad(tiles, (1, 1, 1, 1), value=1.0)
    edge = (functional.max_pool2d(framed, 3, 1) + functional.max_pool2d(-framed, 3, 1)).amax(dim=1, keepdim=True)
    line = (edge > _uniform(0.12, 0.52, count, generator)).float()
    thick = _uniform(0, 1, count, generator) < 0.4
    line = torch.where(thick, functional.max_pool2d(line, 3, 1, 1), line)
    drawn = tiles.amin(dim=1, keepdim=True) < PAPER
    tone = grey(tiles)
    dark = ((tone <= _uniform(0.25, 0.75, count, generator)) & drawn).float()
    coloured = _recolour(tiles, drawn, generator)
    ways = {
        "as it is": tiles,
        "other colours": coloured,
        "colours with outlines": coloured * (1 - line),
        "pale colours with outlines": (1 - 0.6 * (1 - coloured)) * (1 - line),
        "greys": tone,
        "outlines": 1 - line,
        "two tones": 1 - dark,
        "two tones, inverted": torch.where(drawn, dark, 1.0),
        "shape with inner lines": torch.where(drawn, line, 1.0),
    }
    table = torch.stack([ways[name].expand_as(tiles) for name in SHARES])
    chosen = torch.multinomial(torch.tensor(list(SHARES.values())), count, replacement=True, generator=generator)
    return table[chosen, torch.arange(count)]


def _recolour(tiles: torch.Tensor, drawn: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Channels in another order, other saturation and brightness."""
    count = len(tiles)
    order = torch.rand(count, 3, generator=generator).argsort(dim=1)
    swapped = torch.gather(tiles, 1, order[:, :, None, None].expand_as(tiles))
    pale = grey(swapped)
    vivid = (pale + (swapped - pale) * _uniform(0, 1.3, count, generator)).clamp(1e-4, 1)
    return torch.where(drawn, vivid ** _uniform(-0.8, 0.8, count, generator).exp(), vivid)


def place(tiles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each tile smaller or as large, anywhere, a little turned and stretched, or mirrored: [B, 3, H, W]."""
    count = len(tiles)
    scale, angle, stretch = (
        _uniform(low, high, count, generator).view(-1) for low, high in ((0.69, 1.05), (-0.25, 0.25), (-0.15, 0.15))
    )
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    room = (1 - scale).clamp(min=0)
    left, top = ((2 * torch.rand(count, generator=generator) - 1) * room for _ in range(2))
    across, down = mirrored * stretch.exp(), stretch.neg().exp()
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    rows = (
        torch.stack((cosine * across, sine * down, -left / scale), dim=1),
        torch.stack((-sine * across, cosine * down, -top / scale), dim=1),
    )
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(tiles.shape), align_corners=False)
    return 1 - functional.grid_sample(1 - tiles, grid, align_corners=False)  # what comes in from outside is white


def to_tensor(tiles: list[Image.Image]) -> torch.Tensor:
    """Images of one size → [B, 3, H, W] float32 in 0 … 1."""
    return torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles]).float() / 255


def vary(tile: Image.Image, rng: random.Random) -> Image.Image:
    """One tile, restyled."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    (varied,) = restyle(to_tensor([tile]), generator)
    return Image.fromarray((varied * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
