"""What shows of a model before its weights are there: problems of the config, and what its regexes match."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from digrap_scale.config import Config
from digrap_scale.errors import ConfigError
from digrap_scale.models.adapters import add_lora
from digrap_scale.models.build import family_of, load_tokenizer, meta_model, one_line_of, read_config, resolve_folder
from digrap_scale.models.embeddings import build_embed
from digrap_scale.models.families.packing import check_packable
from digrap_scale.models.forward import set_forward
from digrap_scale.models.freeze import apply_freezing, freeze_body, head_parameters
from digrap_scale.models.groups import build_groups, describe_groups


def check_model(config: Config, num_classes: int | None = None) -> list[str]:
    """Every problem of the model's section that shows without its weights, a line each; empty if nothing was found.

    The model is built on the meta device from its config, so regexes meet the real names.
    """
    settings = config.model
    try:
        folder = resolve_folder(settings, weights=False)
        model = meta_model(read_config(folder, settings, num_classes), settings)
    except ConfigError as error:
        return error.problems
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        return [f"model.path: {settings.path}: no model can be built from its config.json: {one_line_of(error)}"]
    problems = []
    try:
        set_forward(model, config)
    except ConfigError as error:
        problems += error.problems
    if config.evaluation.interpolate_alphas and settings.task == "classification" and num_classes is not None:
        stored = read_config(folder, settings, None).num_labels
        if stored != num_classes:
            problems.append(
                f"evaluation.interpolate_alphas: the head starts new ({stored} classes in {settings.path}, {num_classes} in "
                "data.classes), so there is nothing to interpolate it with; set model.path to the `final` folder of a "
                "linear_probe run, or remove interpolate_alphas"
            )
    if folder == Path(settings.path) and not any(folder.glob("*.safetensors")):
        problems.append(f"model.path: {settings.path} has no safetensors weights")
    low_precision = sorted({settings.dtype, config.sharding.mixed_precision} - {"float32", "none"})
    if low_precision and config.sharding.backend not in ("single", "ddp"):
        # Exactly torch's layers: their statistics stay float32. Our own towers compute BatchNorm in float32 themselves.
        layers = [n for n, m in model.named_modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
        if layers:
            problems.append(
                f"sharding.mixed_precision, model.dtype: {low_precision[0]} does not work with BatchNorm ({layers[0]} and "
                f"{len(layers) - 1} more) under {config.sharding.backend}; use float32, or sharding.backend: ddp"
            )
    if settings.generative:
        try:
            if config.data.pack_tokens is not None:
                check_packable(model.config)
            family_of(folder, model.config, settings)
        except ConfigError as error:
            problems += error.problems
    if settings.task == "contrastive" and load_tokenizer(folder, settings) is None:
        problems.append(f"model.path: {settings.path} has no tokenizer, and model.task: contrastive needs one")
    wrapped: nn.Module = model
    try:
        if settings.lora is not None:
            with torch.device("meta"):
                wrapped = add_lora(model, settings.lora)
    except ConfigError as error:
        return problems + error.problems
    checks: list[Callable[[], object]] = [
        lambda: apply_freezing(wrapped, settings),
        lambda: _freeze_body(wrapped, config),
        lambda: build_groups(wrapped, config.optimizer),
    ]
    if config.evaluation.shift_degree is not None:
        checks.append(lambda: build_embed(settings.task, wrapped))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    return problems


def describe_model(config: Config, num_classes: int | None = None) -> list[str]:
    """What the regexes of a config without problems (``check_model``) match, a line each; loads no weights."""
    model, lines = outline(config, resolve_folder(config.model), num_classes)
    return lines + describe_groups(build_groups(model, config.optimizer))


def outline(config: Config, folder: Path, num_classes: int | None = None) -> tuple[nn.Module, list[str]]:
    """The model of ``folder``'s config.json on the meta device, adapters added and parameters frozen as a run's; and lines
    that tell what the regexes matched. Which parameters start new shows in the checkpoint alone.

    Raises:
        ConfigError: as ``build_model``'s.
    """
    settings = config.model
    try:
        with torch.device("meta"):
            base = meta_model(read_config(folder, settings, num_classes), settings)
            model: nn.Module = base if settings.lora is None else add_lora(base, settings.lora)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.path: {settings.path}: no model can be built from its config.json: {one_line_of(error)}"
        ) from error
    return model, apply_freezing(model, settings) + _freeze_body(model, config)


def _freeze_body(model: nn.Module, config: Config) -> list[str]:
    """As far as it shows without the checkpoint: which parameters start new does not."""
    if not getattr(config.method, "head", None):
        return []
    return freeze_body(model, config.method, head_parameters(model, config.method, ()))
