"""Every family's embeddings: an image moves `vision`, a question moves `question`, both move `joint`, padding moves none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from digrap_scale.models.embeddings import build_embed
from digrap_scale.models.families import Family, build_family
from digrap_scale.models.processors import load_processor
from digrap_scale.types import Batch
from tests.models.tiny_vlm import MAKERS, save_tiny_vlm

RED, BLUE = (Image.new("RGB", (20, 20), color) for color in ((200, 30, 30), (9, 9, 200)))
WIDE = RED.resize((60, 20))
SHORT, LONG = "what is this ?", "how many in the picture , what colour is this ?"
# (question, images) of samples
Samples = list[tuple[str, list[Any]]]
SAMPLES: Samples = [(SHORT, [RED]), (SHORT, [BLUE]), (LONG, [RED]), (SHORT, [])]


Embedded = Callable[[Samples], dict[str, tuple[torch.Tensor, torch.Tensor]]]


def opened(kind: str, folder: Path) -> tuple[Family, Embedded]:
    save_tiny_vlm(kind, folder)
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    embed = build_embed("vqa", model, family.is_text)

    @torch.no_grad()
    def embedded(samples: Samples) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        rows = [family.encode(question, images) for question, images in samples]
        return embed(model, Batch(family.join(rows, left=True), torch.zeros(len(rows), dtype=torch.int64)))

    return family, embedded


@pytest.mark.parametrize("kind", MAKERS)
def test_what_moves_what(kind: str, tmp_path: Path) -> None:
    _, embedded = opened(kind, tmp_path)
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


@pytest.mark.parametrize("kind", MAKERS)
def test_a_question_does_not_see_how_large_its_image_is(kind: str, tmp_path: Path) -> None:
    """Nor whether there is one: tiles' names, what stands around images and line ends between tiles are no words of it."""
    family, embedded = opened(kind, tmp_path)
    vectors, counted = embedded([(SHORT, [RED]), (SHORT, [WIDE]), (SHORT, []), (SHORT, [RED, WIDE])])["question"]
    assert counted.all()
    for other in vectors[1:]:
        torch.testing.assert_close(other, vectors[0], rtol=1e-3, atol=1e-5)
    if kind in ("idefics3", "smolvlm"):  # it would without: what is around the images differs
        around = [
            set(family.encode(SHORT, [one]).tokens["input_ids"]) - {family.processor.image_token_id}
            for one in (RED, WIDE)
        ]
        assert around[0] != around[1]
        words = [set(torch.tensor(sorted(one))[family.is_text(torch.tensor(sorted(one)))].tolist()) for one in around]
        assert words[0] == words[1] and words[0]
