"""A config's model, engine and task, built and wrapped; its projector."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from digrap_scale.config import Config
from digrap_scale.data.tasks.base import Task
from digrap_scale.data.tasks.build import build_task, required_classes
from digrap_scale.method.build import from_config
from digrap_scale.models.adapters import load_adapter
from digrap_scale.models.build import BuiltModel, build_model
from digrap_scale.models.forward import set_forward
from digrap_scale.models.groups import build_groups
from digrap_scale.projector import Projector, attach
from digrap_scale.reference.initial import open_weights
from digrap_scale.sharding.build import build_engine
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.setup import Place, seed_everything


@dataclass
class BuiltRun:
    """A model that is built and wrapped."""

    built: BuiltModel
    engine: Engine
    model_class: type[nn.Module]
    base_class: type[nn.Module]  # without adapters
    task: Task | None


def build_run(config: Config, here: Place, adapter: Path | None = None) -> BuiltRun:
    """The model of ``model.path`` (with a saved adapter, if given), sharded, with its optimizer; seeds the process. Collective.

    Raises:
        ConfigError, CheckpointError: see ``build_model`` and ``build_engine``.
    """
    classes = required_classes(config) if config.data.classes is not None else None
    built = build_model(config, len(classes.names) if classes is not None else None, open_weights)
    if adapter is not None:
        load_adapter(built.model, adapter)
    model_class = type(built.model)
    base: Any = getattr(built.model, "get_base_model", lambda: built.model)()
    set_forward(base, config)
    if classes is not None and config.model.task == "classification":
        # For whoever opens final/ in transformers: names in place of LABEL_0, or of the pre-training's classes.
        base.config.id2label = dict(enumerate(classes.names))
        base.config.label2id = {name: index for index, name in enumerate(classes.names)}
    engine = build_engine(
        built.model,
        lambda model: make_optimizer(model, config, built.head),
        config,
        here.device,
        here.world_size,
        built.slices,
    )
    seed_everything(config.run.seed, here.rank)
    evaluates = classes is not None or config.model.generative
    task = build_task(config, built.processor, built.tokenizer, False, built.family) if evaluates else None
    return BuiltRun(built, engine, model_class, type(base), task)


def make_optimizer(model: nn.Module, config: Config, head: Collection[str] = ()) -> Optimizer:
    """torch's optimizer of the config's name, over the config's parameter groups; fused where the device has it.

    ``head`` has groups of its own: it may train while the rest does not.
    """
    options = config.optimizer
    groups = build_groups(model, options, head)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)
    cls = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return cls(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def attach_projector(run: BuiltRun, config: Config) -> Projector:
    """The method of the config, attached to the run's optimizer; see ``attach``. Collective."""
    model, optimizer = run.engine.attached_to
    source = config.reference.source
    method = from_config(config.method, run.built.head)
    if config.logging.layers_every_steps is not None:
        method.uses_reference = True  # also of a method that does not look at it: to measure how far layers are from it
    reference: str | Path | None = run.built.checkpoint_folder if source == "pretrained" else source
    if config.model.lora is not None and source == "pretrained" and not config.model.lora.modules_to_save:
        reference = None  # adapters only: their reference is zero, the base's is not needed
    new = run.built.new_parameters if method.uses_reference else set()  # all of them train: build_model sees to it
    return attach(
        model,
        optimizer,
        method=method,
        reference=reference,
        reference_placement=config.reference.placement,
        reference_buffer_bytes=config.reference.buffer_bytes,
        reference_rename=config.reference.rename,
        not_projected=[f"^{re.escape(name)}$" for name in sorted(new)],
        max_grad_norm=run.engine.max_grad_norm,
        previous=config.reference.previous,
        kernels=config.training.kernels,
        projection=config.training.projection,
        statistics=config.training.statistics,
    )
