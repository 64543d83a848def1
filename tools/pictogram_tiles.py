"""Pictograms as 64-pixel tiles, by style and concept; variations of them for pre-training."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictograms as pg

from digrap_scale.demo import pictogram_vqa, scenes

GREY_SHARE, LINE_SHARE = 0.15, 0.25


def concepts_of(split: pg.Split, part: str, drawn: set[str] | None = None) -> dict[str, list[str]]:
    """Class → its concepts of one part ("train" or "test"), sorted; only those in ``drawn`` if it is given."""
    of_part = split.test if part == "test" else split.label.keys() - split.test
    return pictogram_vqa.by_class(of_part if drawn is None else of_part & drawn, split.label)


def render_tiles(style: str, packages: Path, concepts: set[str]) -> dict[str, Image.Image]:
    """Concept → tile, of those ``concepts`` that the style draws."""
    icons = pg.read_icons(pg.fetch((pg.STYLES | pg.FETCHED_STYLES)[style], packages))
    return {concept: pg.render(icons[concept], scenes.TILE) for concept in sorted(concepts) if concept in icons}


def vary(tile: Image.Image, rng: random.Random) -> Image.Image:
    """The tile as it is, in greys, or as its outlines: so that pre-training does not rest on colour alone."""
    choice = rng.random()
    if choice < GREY_SHARE:
        return ImageOps.grayscale(tile).convert("RGB")
    if choice < GREY_SHARE + LINE_SHARE:
        # Edges are found inside a white frame: the filter leaves an image's border as it is.
        framed = ImageOps.expand(ImageOps.grayscale(tile), 2, 255)
        edges = ImageOps.invert(framed.filter(ImageFilter.FIND_EDGES)).crop((2, 2, 2 + tile.width, 2 + tile.height))
        level = rng.randint(140, 225)
        return edges.point([0 if value < level else 255 for value in range(256)]).convert("RGB")
    return tile
