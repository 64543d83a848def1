"""The training data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .base import NonNegativeInt, PositiveFloat, Section, Text


class SourceConfig(Section):
    """One source of a mixture."""

    name: Text = Field(description="Its name in the logs.")
    shards: list[Text] = Field(min_length=1, description="Shard files or patterns, as in `train`.")
    weight: PositiveFloat = Field(description="Its share of the samples, against the other sources' weights.")


class DataConfig(Section):
    """webdataset shards of an image and a JSON a sample."""

    train: list[Text] = Field(
        default=[],
        description=(
            "Shard files or patterns (`{000..009}`, `*`), relative to the working directory; give this or `sources`."
        ),
    )
    sources: list[SourceConfig] = Field(default=[], description="Several sets of shards, mixed by weights.")
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
    prefetch_batches: PositiveInt = Field(default=2, description="Batches that each loader process makes ahead.")
    shuffle_buffer_samples: NonNegativeInt = Field(
        default=1000,
        description=(
            "Neighbouring samples that are shuffled among each other, beside the order of the shards; 0 keeps the order. "
            "Costs no memory; reads are scattered over so many samples."
        ),
    )
    order: Literal["local", "global"] = Field(
        default="local",
        description=(
            "`local`: each rank reads consecutive parts of the shards; `global`: the sequence of samples over all ranks "
            "is the same for any world size."
        ),
    )
    remainder: Literal["drop", "pad", "repeat"] = Field(
        default="drop",
        description=(
            "An epoch's last samples that fill no step: `drop` them (others each epoch), `pad`: one step more with "
            "smaller batches, `repeat`: one step more, filled up from the epoch's start."
        ),
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error",
        description="A training sample that cannot be read: stop, or leave it out and count it (`bad_samples`).",
    )
    max_bad_samples: NonNegativeInt = Field(
        default=100, description="Bad samples that `skip` puts up with, on each rank."
    )
    augment: Literal["none", "crop"] = Field(default="none", description="`crop`: random resized crop (no flip).")
