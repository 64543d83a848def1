"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726): no turns; images, then text, then a line's end; the answer follows.

The prompt is read in both directions (``token_type_ids`` 0), the answer causally (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from digrap_scale.models.families.base import Family


class PaliGemma(Family):
    """The processor puts ``<bos>`` behind the images and a line's end behind the text; text alone is written likewise."""

    answer_values = {"attention_mask": 1, "token_type_ids": 1}

    def check(self) -> None:
        """Nothing to ask through."""

    def turn(self) -> tuple[str, str]:
        return "", self.tokenizer.eos_token

    def prompt(self, question: str, images: int) -> str:
        return f"{self.tokenizer.bos_token}{question}\n"

    def encode_prompt(
        self, prompt: str, images: Sequence[Any], **options: Any
    ) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
        if not images:
            ids = self.tokenizer([prompt], add_special_tokens=False)["input_ids"][0]
            return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}, {}
        question = prompt.removeprefix(self.tokenizer.bos_token).removesuffix("\n")
        placeholders = self.processor.image_token * len(images)
        return super().encode_prompt(placeholders + question, images, **options)
