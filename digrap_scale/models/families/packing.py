"""Several short samples in one row, of which none sees another.

A row's ``position_ids`` begin anew with each sample, and there is no ``attention_mask``: from that transformers' own masks
tell samples apart (``masking_utils.find_packed_sequence_indices``; it needs ``use_cache=False``), with sliding windows and
all. Only models that hand positions on to those masks can do it, so only such are listed as tests have held against rows
of one sample each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from digrap_scale.errors import ConfigError

# model_type of a vision-language model; of its language model. Not: Qwen-VL, whose positions have three axes (mRoPE);
# PaliGemma, whose mask has a prefix that is read in both directions.
PACKABLE_MODELS = ("idefics3", "llava", "llava_onevision", "smolvlm")
PACKABLE_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
PACKABLE_ATTENTION = ("eager", "sdpa")  # flash attention tells samples apart in a batch of one row alone


def check_packable(model_config: Any) -> None:
    """Raises: ConfigError where samples of a model of this config cannot share a row."""
    text = model_config.get_text_config()
    # What from_pretrained chose or was told; transformers has no public name for it.
    attention = text._attn_implementation or "sdpa"
    for what, found, known in (
        ("a model", model_config.model_type, PACKABLE_MODELS),
        ("a language model", text.model_type, PACKABLE_LANGUAGE_MODELS),
        ("an attention", attention, PACKABLE_ATTENTION),
    ):
        if found not in known:
            raise ConfigError(
                f"data.pack_tokens: expected {what} of {', '.join(known)}, found {found}; remove the key, and shorten padding "
                "with data.bucket_by_length instead"
            )


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the samples of each row: the longest first, each into the first row that has room for it.

    At most 11/9 of the fewest rows, and one (Johnson 1973, "Near-optimal bin packing algorithms"). A function of the
    lengths alone. Within a row, and by their first samples, in the samples' order.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room_left in enumerate(left) if room_left >= lengths[sample]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(room)
        rows[row].append(sample)
        left[row] -= lengths[sample]
    return sorted(sorted(row) for row in rows)
