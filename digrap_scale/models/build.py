"""One way to every model: transformers' Auto classes on a folder in Hugging Face layout.

Our own towers are known to the Auto classes by importing ``models.towers``. Weights are read from safetensors only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from digrap_scale.config.schema import Config, ModelConfig
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.models.adapters import add_lora, original_name
from digrap_scale.models.embeddings import build_embed
from digrap_scale.models.families import Family, build_family
from digrap_scale.models.families.encoders import classifier_config
from digrap_scale.models.families.packing import check_packable
from digrap_scale.models.freeze import apply_freezing, freeze_batch_norm, freeze_body, head_parameters
from digrap_scale.models.groups import build_groups, describe_groups
from digrap_scale.models.hollow import hollow_out, load_hollow, obstacle, renamed
from digrap_scale.models.processors import load_processor
from digrap_scale.models.towers import TextTable
from digrap_scale.models.towers.text_table import TEXTS_FILE
from digrap_scale.types import Slices, StoredWeights

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_SHOWN_TENSORS = 8
_AUTO_CLASSES: dict[str, Any] = {
    "classification": AutoModelForImageClassification,
    "contrastive": AutoModel,
    "vqa": AutoModelForImageTextToText,
    "classification-as-vqa": AutoModelForImageTextToText,
}

# A folder and a model of its architecture without weights → the folder's checkpoint, opened.
OpenWeights = Callable[[Path, PreTrainedModel], StoredWeights]


@dataclass
class BuiltModel:
    """A model, ready to shard and to train, and what belongs to it.

    Attributes:
        model: on the CPU, in ``model.dtype``; adapters added, parameters frozen. With ``slices``, parameters that the
            checkpoint has are on the meta device.
        processor: the image processor, or None if the folder has none; of a generative model, the whole processor.
        tokenizer: the tokenizer, or None if the folder has none.
        checkpoint_folder: where the pre-trained safetensors are.
        new_parameters: names (of ``model``) that the checkpoint has no value for: a new head. They have no reference.
        report: lines that tell what regexes and options did.
        slices: reads elements of the parameters on the meta device, by their names in ``model``; None if there are none.
        family: how a generative model is asked; None for others.
        head: names (of ``model``) that linear probing trains; empty for other methods.
    """

    model: nn.Module
    processor: Any | None
    tokenizer: Any | None
    checkpoint_folder: Path
    new_parameters: set[str] = field(default_factory=set)
    report: list[str] = field(default_factory=list)
    slices: Slices | None = None
    family: Family | None = None
    head: set[str] = field(default_factory=set)


def build_model(config: Config, num_classes: int | None, open_weights: OpenWeights | None = None) -> BuiltModel:
    """Builds the model of ``model.path`` with its pre-trained weights.

    Parameters that start new (head, adapters) are drawn from ``run.seed``, so they are equal on every rank.

    Args:
        config: the run.
        num_classes: outputs of a classifier; None keeps the checkpoint's.
        open_weights: opens the checkpoint, so that its parameters take no memory here: an engine reads each rank's
            slices of them. A checkpoint that can only be loaded whole is, and ``report`` says why. None: load it whole.

    Raises:
        ConfigError: no such path or hub id, a head of another size without ``model.new_head``, a regex without a match.
        CheckpointError: no safetensors, damaged ones, or tensors missing from or differing in shape with the model.
    """
    settings = config.model
    folder = resolve_folder(settings)
    model_config = _read_config(folder, settings, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        twin, stored = None, None
        report: list[str] = []
        if open_weights is not None:
            twin, stored, report = _open(folder, model_config, settings, open_weights)
        model, new = _load(folder, model_config, settings, twin, stored)
        report += [f"new head: {name}" for name in sorted(new)]
        wrapped: nn.Module = model
        unstored = set(new)
        if settings.lora is not None:
            if stored is not None:  # what PEFT copies, it copies without memory
                hollow_out(model, stored, unstored, settings.lora.modules_to_save)
            wrapped = add_lora(model, settings.lora)
            new = {name for name, _ in wrapped.named_parameters() if original_name(name) in new}
    report += apply_freezing(wrapped, settings)
    head = head_parameters(wrapped, config.method, new)
    report += freeze_body(wrapped, config.method, head)
    idle = sorted(name for name, parameter in wrapped.named_parameters() if name in new and not parameter.requires_grad)
    if idle:
        remedy = "add its module to model.lora.modules_to_save" if settings.lora is not None else "do not freeze it"
        raise ConfigError(f"model.new_head: {idle[0]} starts new but does not train; {remedy}")
    if settings.batch_norm == "frozen":
        layers = freeze_batch_norm(wrapped)
        if layers:
            report.append(f"model.batch_norm: the statistics of {layers} layers are frozen")
    slices = None if stored is None else renamed(stored.read, hollow_out(wrapped, stored, unstored))
    if settings.generative:
        if config.data.pack_tokens is not None:
            check_packable(model.config)
        family = _family(folder, model_config, settings)
        family.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        model._no_split_modules = sorted({*(model._no_split_modules or []), *family.wrap})
        whole = family.processor
        return BuiltModel(wrapped, whole, whole.tokenizer, folder, new, report, slices, family, head)
    processor = _optional(AutoImageProcessor, folder, settings, ("preprocessor_config.json", "processor_config.json"))
    tokenizer = load_tokenizer(folder, settings)
    return BuiltModel(wrapped, processor, tokenizer, folder, new, report, slices, head=head)


def _family(folder: Path, model_config: PreTrainedConfig, settings: ModelConfig) -> Family:
    return build_family(model_config, load_processor(folder, model_config, settings.trust_remote_code), folder)


def resolve_folder(settings: ModelConfig, weights: bool = True, only_config: bool = False) -> Path:
    """The local folder of ``model.path``; a hub id is downloaded (or taken from the cache) without any pickled file.

    Args:
        settings: the model's section.
        weights: whether a download takes the safetensors too.
        only_config: a download takes ``config.json`` alone (and code, if it is trusted).

    Raises:
        ConfigError: neither a folder with a ``config.json`` nor a hub id that can be had.
    """
    path = Path(settings.path)
    if path.exists() or settings.path.startswith((".", "/", "~")) or settings.path.count("/") > 1:
        if not path.is_dir():
            raise ConfigError(f"model.path: {settings.path} is not a folder")
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.path: {settings.path} has no config.json; expected Hugging Face layout")
        return path
    small = ["config.json"] if only_config else _SMALL_FILES + ["*.safetensors"] * weights
    files = small + ["*.py"] * settings.trust_remote_code
    try:
        return Path(snapshot_download(settings.path, allow_patterns=files))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConfigError(
            f"model.path: {settings.path!r} is neither a local folder nor a hub id that can be had: {_one_line(error)}"
        ) from error


def _read_config(folder: Path, settings: ModelConfig, num_classes: int | None) -> PreTrainedConfig:
    """The model's config, with the head's size set."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.path: {folder / 'config.json'} cannot be used: {_one_line(error)}") from error
    if settings.task == "classification":
        config = classifier_config(config)
    if settings.task == "classification" and num_classes is not None and config.num_labels != num_classes:
        if not settings.new_head:
            raise ConfigError(
                f"model.path: {folder} has a head of {config.num_labels} classes, data.classes has {num_classes}; "
                "set model.new_head: true to start a new head"
            )
        config.num_labels = num_classes
    return config


def _auto_class(settings: ModelConfig) -> Any:
    return _AUTO_CLASSES[settings.task]


def _open(
    folder: Path, config: PreTrainedConfig, settings: ModelConfig, open_weights: OpenWeights
) -> tuple[PreTrainedModel | None, StoredWeights | None, list[str]]:
    """The architecture without weights and the checkpoint, if its tensors can be read slice by slice; else why not."""
    why = obstacle(folder, config)
    if settings.lora is not None and settings.lora.dora:
        why = "DoRA's magnitudes start at the norms of its weights"
    if why is None:
        try:
            twin = meta_model(config, settings)
            stored = open_weights(folder, twin)
        except (CheckpointError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(f"model.path: {folder}: weights cannot be loaded: {_one_line(error)}") from error
        if not stored.converted:
            return twin, stored, []
        why = f"{len(stored.converted)} of its tensors are merged or split on their way in ({stored.converted[0]})"
    return None, None, [f"model.path: every process loads the whole checkpoint: {why}"]


def _load(
    folder: Path,
    config: PreTrainedConfig,
    settings: ModelConfig,
    twin: PreTrainedModel | None,
    stored: StoredWeights | None,
) -> tuple[PreTrainedModel, set[str]]:
    """The model with its weights (stand-ins for those that are stored), and the names that start new."""
    dtype = getattr(torch, settings.dtype)
    try:
        if twin is not None and stored is not None:
            model, info = load_hollow(twin, folder, config, dtype, stored)
        else:
            model, info = _auto_class(settings).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=settings.trust_remote_code,
                ignore_mismatched_sizes=True,  # judged below, tensor by tensor
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"model.path: {folder}: weights cannot be loaded: {_one_line(error)}") from error
    differing = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
    absent = set(info["missing_keys"]) - set(differing)
    new: set[str] = set()
    if (absent or differing) and settings.task == "classification":
        new = (absent | set(differing)) & head_names(config, settings)
    bad = sorted((absent | set(differing)) - (new if settings.new_head else set()))
    if bad:
        lines = [
            f"{name} (checkpoint {list(differing[name][0])}, model {list(differing[name][1])})"
            if name in differing
            else f"{name} (missing)"
            for name in bad
        ]
        more = f" and {len(lines) - _SHOWN_TENSORS} more" if len(lines) > _SHOWN_TENSORS else ""
        remedy = "; set model.new_head: true to start a new head" if set(bad) <= new else ""
        listed = ", ".join(lines[:_SHOWN_TENSORS])
        raise CheckpointError(f"model.path: {folder}: tensors that do not fit the model: {listed}{more}{remedy}")
    if info.get("error_msgs"):
        raise CheckpointError(f"model.path: {folder}: weights cannot be loaded: {'; '.join(info['error_msgs'])}")
    return model, new


def head_names(config: PreTrainedConfig, settings: ModelConfig) -> set[str]:
    """Names of a classifier's head: what lies outside the base model, or changes shape with the number of classes."""
    wider = copy.deepcopy(config)
    wider.num_labels = len(config.id2label or {}) + 1
    model, other = meta_model(config, settings), meta_model(wider, settings)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    names = {name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]}
    base = model.base_model_prefix
    if model.base_model is not model:
        names |= {name for name, _ in model.named_parameters() if not name.startswith(base + ".")}
    return names


def meta_model(config: PreTrainedConfig, settings: ModelConfig) -> PreTrainedModel:
    """The model's shapes without memory."""
    with torch.device("meta"):
        return _auto_class(settings).from_config(config, trust_remote_code=settings.trust_remote_code)


def _optional(auto: Any, folder: Path, settings: ModelConfig, files: tuple[str, ...]) -> Any | None:
    """A processor or tokenizer of the folder, or None if none of its files is there."""
    if not any((folder / name).is_file() for name in files):
        return None
    # PIL's resampling on every machine, whether torchvision is installed or not.
    extra = {"backend": "pil"} if auto is AutoImageProcessor else {}
    try:
        return auto.from_pretrained(folder, trust_remote_code=settings.trust_remote_code, **extra)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"model.path: {folder}: {auto.__name__} cannot be loaded: {_one_line(error)}") from error


def load_tokenizer(folder: Path, settings: ModelConfig) -> Any | None:
    """The folder's tokenizer or text table; None if it has neither."""
    if (folder / TEXTS_FILE).is_file():
        return TextTable.from_pretrained(folder)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
    return _optional(AutoTokenizer, folder, settings, files)


def check_model(config: Config, num_classes: int | None = None) -> list[str]:
    """Every problem of the model's section that shows without its weights, a line each; empty if nothing was found.

    The model is built on the meta device from its config, so regexes meet the real names.
    """
    settings = config.model
    try:
        folder = resolve_folder(settings, weights=False)
        model = meta_model(_read_config(folder, settings, num_classes), settings)
    except ConfigError as error:
        return error.problems
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        return [f"model.path: {settings.path}: no model can be built from its config.json: {_one_line(error)}"]
    problems = []
    if config.evaluation.interpolate_alphas and settings.task == "classification" and num_classes is not None:
        stored = _read_config(folder, settings, None).num_labels
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
            _family(folder, model.config, settings)
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
            base = meta_model(_read_config(folder, settings, num_classes), settings)
            model: nn.Module = base if settings.lora is None else add_lora(base, settings.lora)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.path: {settings.path}: no model can be built from its config.json: {_one_line(error)}"
        ) from error
    return model, apply_freezing(model, settings) + _freeze_body(model, config)


def _freeze_body(model: nn.Module, config: Config) -> list[str]:
    """As far as it shows without the checkpoint: which parameters start new does not."""
    if not getattr(config.method, "head", None):
        return []
    return freeze_body(model, config.method, head_parameters(model, config.method, ()))


def _one_line(error: Exception) -> str:
    """An error's text on one line, without the advice that libraries add below their first paragraph."""
    text = str(error).strip().split("\n\n")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"[:400]
