"""The training data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .base import NonNegativeInt, Section, Text


class DataConfig(Section):
    """webdataset shards: a JSON a sample, and its image or images."""

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
    question_field: Text = Field(default="question", description="vqa: key of the question in a sample's JSON.")
    answers_field: Text = Field(
        default="answers", description="vqa: key of the list of answers (one, or one an annotator) in a sample's JSON."
    )
    answer_choice: Literal["most_frequent", "random"] = Field(
        default="most_frequent",
        description=(
            "vqa: which of several answers is trained on: the `most_frequent` (the first of equals), or a `random` one, drawn "
            "anew in each epoch from the seed."
        ),
    )
    prompt: Text = Field(
        default="{question}",
        description=(
            "vqa: what is put to the model; `{question}` stands for the sample's question. PaliGemma was trained with `answer "
            "en {question}`, LLaVA with a line `Answer the question using a single word or phrase.` below it."
        ),
    )
    max_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "vqa: most tokens of a sample, images included; a longer one is an error. Empty: as many as the model has positions."
        ),
    )
    workers: NonNegativeInt = Field(default=0, description="Loader processes a rank.")
    shuffle_buffer_samples: NonNegativeInt = Field(
        default=1000, description="Samples that a worker shuffles among; 0 keeps the order."
    )
    augment: Literal["none", "crop"] = Field(default="none", description="`crop`: random resized crop (no flip).")
