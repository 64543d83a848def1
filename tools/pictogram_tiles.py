"""Pictograms as 64-pixel tiles, by style and concept."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictograms as pg

from digrap_scale.demo import pictogram_vqa, scenes


def concepts_of(split: pg.Split, part: str, drawn: set[str] | None = None) -> dict[str, list[str]]:
    """Class → its concepts of one part ("train" or "test"), sorted; only those in ``drawn`` if it is given."""
    of_part = split.test if part == "test" else split.label.keys() - split.test
    return pictogram_vqa.by_class(of_part if drawn is None else of_part & drawn, split.label)


def render_tiles(style: str, packages: Path, concepts: set[str]) -> dict[str, Image.Image]:
    """Concept → tile, of those ``concepts`` that the style draws."""
    icons = pg.read_icons(pg.fetch((pg.STYLES | pg.FETCHED_STYLES)[style], packages))
    return {concept: pg.render(icons[concept], scenes.TILE) for concept in sorted(concepts) if concept in icons}
