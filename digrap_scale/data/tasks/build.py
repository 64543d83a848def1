"""The config's task, ready to collate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from digrap_scale.config.schema import Config, GenerationConfig
from digrap_scale.data.classes import Classes, load_classes
from digrap_scale.data.tasks.base import Task
from digrap_scale.data.tasks.classification import ClassificationTask
from digrap_scale.data.tasks.classification_vqa import ClassificationVqaTask
from digrap_scale.data.tasks.contrastive import ContrastiveCaptionTask, ContrastiveLabelTask
from digrap_scale.data.tasks.vqa import Encoder, VqaTask
from digrap_scale.errors import ConfigError


def build_task(
    config: Config, processor: Any, tokenizer: Any | None, train: bool, encoder: Encoder | None = None
) -> Task:
    """The task of ``model.task`` and ``data.target``.

    Evaluation is always over classes, also for a model that trains on captions, and never augments.

    Args:
        processor: the model's image processor.
        tokenizer: the model's tokenizer (contrastive), called with a list of texts.
        train: whether batches are for training.
        encoder: how a generative model is asked (vqa).

    Raises:
        ConfigError: no processor or tokenizer where one is needed; no ``data.classes`` where classes are needed.
    """
    model, data = config.model, config.data
    common: dict[str, Any] = {
        "label_field": data.label_field,
        "crop": train and data.augment == "crop",
        "dtype": getattr(torch, model.dtype),
    }
    if model.generative:
        assert encoder is not None, "build_model gives one for these tasks"
        common.update(
            train=train,
            prompt=data.prompt,
            answer_choice=data.answer_choice,
            max_tokens=data.max_tokens,
            pack_tokens=data.pack_tokens,
            max_forward_tokens=data.max_forward_tokens,
            max_forward_images=data.max_forward_images,
            generation=(config.evaluation.generation or GenerationConfig()).model_dump(),
        )
        if model.task == "vqa":
            fields: dict[str, Any] = {"question_field": data.question_field, "answers_field": data.answers_field}
            return VqaTask(encoder, class_names=(), **fields, **common)
        likelihood = config.evaluation.class_answers == "likelihood"
        names = required_classes(config).names
        return ClassificationVqaTask(
            encoder, class_question=data.class_question, likelihood=likelihood, class_names=names, **common
        )
    if processor is None:
        raise ConfigError(f"model.path: {model.path} has no image processor (preprocessor_config.json)")
    captions = train and data.target == "caption"
    if model.task == "classification":
        return ClassificationTask(processor, class_names=required_classes(config).names, **common)
    if tokenizer is None:
        raise ConfigError(f"model.path: {model.path} has no tokenizer, and model.task: contrastive needs one")
    tokenize = partial(_tokenize, tokenizer, _tokenizer_options(config))
    if captions:
        return ContrastiveCaptionTask(
            processor, tokenize=tokenize, caption_field=data.caption_field, class_names=(), **common
        )
    classes = required_classes(config)
    return ContrastiveLabelTask(processor, tokens=tokenize(classes.prompts), class_names=classes.names, **common)


def required_classes(config: Config) -> Classes:
    """The classes file's content.

    Raises:
        ConfigError: ``data.classes`` is not given, or see ``load_classes``.
    """
    if config.data.classes is None:
        raise ConfigError("data.classes: needed to tell classes apart: a JSON list of names or object of name → prompt")
    return load_classes(config.data.classes)


def _tokenizer_options(config: Config) -> dict[str, Any]:
    """Padding and truncation as the text tower was trained: SigLIP sees every text padded to its full length."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(config.model.path)
    except OSError as error:
        raise ConfigError(f"model.path: {config.model.path}: config.json cannot be read") from error
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    is_siglip = str(raw.get("model_type", "")).startswith("siglip")
    positions = (raw.get("text_config") or {}).get("max_position_embeddings")
    if is_siglip:
        options.update(padding="max_length", truncation=True, max_length=positions or 64)
    elif positions is not None:
        options.update(truncation=True, max_length=positions)
    return options


def _tokenize(tokenizer: Any, options: dict[str, Any], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    tokens = tokenizer(list(texts), **options)
    names = [name for name in ("input_ids", "attention_mask") if name in tokens]
    return {name: tokens[name] for name in names}
