"""The registry of vision-language families: ``model_type`` of a config.json → what differs for it.

A model that is not listed is asked through its chat template, which is all that most need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from digrap_scale.models.families.base import Encoded, Family
from digrap_scale.models.families.idefics3 import Idefics3
from digrap_scale.models.families.paligemma import PaliGemma

__all__ = ["FAMILIES", "Encoded", "Family", "build_family"]

FAMILIES: dict[str, type[Family]] = {
    "paligemma": PaliGemma,
    "llava": Family,
    "llava_next": Family,
    "llava_onevision": Family,
    "qwen2_5_vl": Family,
    "qwen3_vl": Family,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
}


def build_family(model_config: Any, processor: Any, folder: Path) -> Family:
    """The family of a model.

    Args:
        model_config: transformers' config of it.
        processor: its processor.
        folder: the checkpoint's, whose generation config may name tokens to stop at.

    Raises:
        ConfigError: see ``Family``.
    """
    ends = None
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    family = FAMILIES.get(model_config.model_type, Family)
    return family(processor, generation_ends=ends, limit=limit)
