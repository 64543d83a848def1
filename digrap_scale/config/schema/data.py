"""The training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from .base import NonNegativeInt, PositiveFloat, Section, Seed, Text


class SourceConfig(Section):
    """One source of a mixture."""

    name: Text = Field(description="Its name in the logs.")
    shards: list[Text] = Field(min_length=1, description="Shard files or patterns, as in `train`.")
    weight: PositiveFloat = Field(description="Its share of the samples, against the other sources' weights.")


class HoldOutConfig(Section):
    """A part of the training data that is withheld from training and measured as `validation`: to select by, no ID result."""

    fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        description="About how much of the samples; which ones is told by a hash of their keys."
    )
    seed: Seed = Field(default=0, description="Draws them; apart from `run.seed`, so that all seeds have the same set.")


class DataConfig(Section):
    """webdataset shards: a JSON a sample, and its image or images."""

    train: list[Text] = Field(
        default=[],
        description=(
            "Shard files or patterns (`{000..009}`, `*`), relative to the working directory; give this or `sources`."
        ),
    )
    sources: list[SourceConfig] = Field(default=[], description="Several sets of shards, mixed by weights.")
    hold_out: HoldOutConfig | None = Field(
        default=None,
        description="Withhold a part of the training data, to select hyper-parameters by; empty: train on all.",
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
    class_question: Text = Field(
        default="What is in the image?",
        description="classification-as-vqa: the question that every class is an answer to.",
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
    pack_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "vqa: short samples of a micro-batch share rows of up to so many tokens, of which none sees another: the same loss, "
            "less padding. No sample may be longer. Empty: a row a sample."
        ),
    )
    max_forward_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "vqa: most tokens, padding included, of one forward in training; a larger micro-batch takes several on every rank, "
            "and the step stays the same. Empty: always one."
        ),
    )
    max_forward_images: PositiveInt | None = Field(
        default=None, description="vqa: most images of one forward in training, as `max_forward_tokens`."
    )
    allow_commands: bool = Field(
        default=False,
        description=(
            "Shards may be `pipe:COMMAND` (run in a shell) and `https://…` (curl): fetched once a node into `cache_folder`."
        ),
    )
    cache_folder: Text | None = Field(
        default=None, description="Where fetched shards are kept; a folder that the processes of a node share."
    )
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
    bucket_by_length: bool = Field(
        default=False,
        description=(
            "Batches of samples whose texts are about equally long (by their bytes), within `shuffle_buffer_samples`; less "
            "padding, less random."
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
