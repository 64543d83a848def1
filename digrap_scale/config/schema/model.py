"""The model and its adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from digrap_scale.config.checks import GENERATIVE_TASKS

from .base import BelowOne, PositiveFloat, Regex, Section, Text


class LoraConfig(Section):
    """Low-rank adapters through PEFT; their reference is zero (of DoRA's magnitudes: their first value)."""

    rank: PositiveInt = Field(default=8, description="Rank of the update.")
    alpha: PositiveFloat = Field(default=16.0, description="Scale of the update (`lora_alpha`).")
    dropout: BelowOne = Field(default=0.0, description="Dropout on the adapter's input.")
    dora: bool = Field(
        default=False,
        description="DoRA: the norms of the weights' rows train by themselves, beside the low-rank change of direction.",
    )
    target_modules: Regex | Annotated[list[Text], Field(min_length=1)] = Field(
        description="Regex, or list of name endings, of the modules to adapt."
    )
    modules_to_save: list[Text] = Field(
        default=[], description="Modules trained in full and saved with the adapter (a new head)."
    )


class ModelConfig(Section):
    """The model, through transformers."""

    path: Text = Field(description="Folder in Hugging Face layout, or a hub id.")
    task: Literal["classification", "contrastive", "vqa", "classification-as-vqa"] = Field(
        description=(
            "What the model is trained for; `vqa`: a generative model answers questions about images; "
            "`classification-as-vqa`: it answers one question with the class's name."
        )
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the weights that are trained."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        default="auto", description="The attention kernel; `auto`: transformers' own choice for the model."
    )
    freeze: list[Regex] = Field(
        default=[], description="Regexes of parameter names that do not train; each must match one."
    )
    train_only: list[Regex] = Field(default=[], description="Regexes: everything that none of them matches is frozen.")
    batch_norm: Literal["frozen", "train"] = Field(
        default="frozen",
        description=(
            "`frozen`: BatchNorm uses its pre-trained statistics; `train`: they follow the data (one process only)."
        ),
    )
    lora: LoraConfig | None = Field(default=None, description="Adapters instead of full fine-tuning.")
    new_head: bool = Field(
        default=False,
        description="Allow a head whose size differs from the checkpoint's: it starts new and is not projected.",
    )

    trust_remote_code: bool = Field(default=False, description="Let transformers run code from the model's repository.")

    @property
    def generative(self) -> bool:
        """Whether the task is for models that generate text."""
        return self.task in GENERATIVE_TASKS
