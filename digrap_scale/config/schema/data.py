"""The training data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import NonNegativeInt, Section, Text


class DataConfig(Section):
    """webdataset shards of an image and a JSON a sample."""

    train: list[Text] = Field(
        min_length=1, description="Shard files or patterns (`{000..009}`, `*`), relative to the working directory."
    )
    classes: Text | None = Field(
        default=None, description="JSON file: class name → prompt (contrastive) or a list of class names."
    )
    target: Literal["label", "caption"] = Field(
        default="label",
        description=(
            "`label`: tell classes apart; `caption`: tell the batch's own captions apart (contrastive pre-training)."
        ),
    )
    label_field: Text = Field(default="label", description="Key of the class name in a sample's JSON.")
    caption_field: Text = Field(default="caption", description="Key of the caption in a sample's JSON.")
    workers: NonNegativeInt = Field(default=0, description="Loader processes a rank.")
    shuffle_buffer_samples: NonNegativeInt = Field(
        default=1000, description="Samples that a worker shuffles among; 0 keeps the order."
    )
    augment: Literal["none", "crop"] = Field(default="none", description="`crop`: random resized crop (no flip).")
