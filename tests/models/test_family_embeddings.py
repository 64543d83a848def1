"""Every family's embeddings: an image moves `vision`, a question moves `question`, both move `joint`, padding moves none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from digrap_scale.models.embeddings import build_embed
from digrap_scale.models.families import build_family
from digrap_scale.models.processors import load_processor
from digrap_scale.types import Batch
from tests.models.tiny_vlm import MAKERS, save_tiny_vlm

RED, BLUE = (Image.new("RGB", (20, 20), color) for color in ((200, 30, 30), (9, 9, 200)))
SHORT, LONG = "what is this ?", "how many in the picture , what colour is this ?"
# (question, images) of samples
SAMPLES: list[tuple[str, list[Any]]] = [(SHORT, [RED]), (SHORT, [BLUE]), (LONG, [RED]), (SHORT, [])]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_moves_what(kind: str, tmp_path: Path) -> None:
    folder = save_tiny_vlm(kind, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    embed = build_embed("vqa", model)

    @torch.no_grad()
    def embedded(samples: list[tuple[str, list[Any]]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        rows = [family.encode(question, images) for question, images in samples]
        return embed(model, Batch(family.join(rows, left=True), torch.zeros(len(rows), dtype=torch.int64)))

    together = embedded(SAMPLES)
    assert together["vision"][1].tolist() == [True, True, True, False]
    for name, (vectors, counted) in together.items():
        for number, sample in enumerate(SAMPLES):
            alone, counts = embedded([sample])[name]  # without images a blank row follows, which is no sample
            assert len(alone) == len(counts) == 1 and counts[0] == counted[number]
            if counted[number]:
                torch.testing.assert_close(vectors[number], alone[0], rtol=1e-3, atol=2e-4)

    def distance(name: str, first: int, second: int) -> float:
        vectors = together[name][0]
        return float((vectors[first] - vectors[second]).norm() / vectors[first].norm())

    assert distance("vision", 0, 2) < 1e-4 < distance("vision", 0, 1)
    assert distance("question", 0, 1) < 1e-4 < distance("question", 0, 2)
    assert min(distance("joint", 0, 1), distance("joint", 0, 2)) > 1e-4
