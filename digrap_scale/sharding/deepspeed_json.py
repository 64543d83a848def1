"""A DeepSpeed config that the user brings: what it may add to ours, and where the two contradict each other.

Ours rules over what the run's config says itself (batches, clipping, optimizer, stage, precision, offload); everything
else is taken from the file. DeepSpeed ignores keys that it does not know at the top; here they are errors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from digrap_scale.config.describe import nearest
from digrap_scale.config.schema import Config, ZeroConfig
from digrap_scale.errors import ConfigError

AUTO = "auto"
_MISSING = object()
# DeepSpeed's sections that have no constant of their own in deepspeed.runtime.constants.
_SECTIONS = (
    "zero_optimization", "activation_checkpointing", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet",
    "flops_profiler", "autotuning", "hybrid_engine", "pipeline", "data_efficiency", "aio", "datastates_ckpt",
    "weight_quantization", "compile", "timers", "tensor_parallel", "expert_parallel", "elasticity", "compression_training",
    "sequence_parallel_size",
)  # fmt: skip
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_elements",
    "sub_group_size": "sub_group_elements",
    "stage3_param_persistence_threshold": "persistence_threshold_elements",
    "param_persistence_threshold": "persistence_threshold_elements",
}
# What no backend can see through (see ``zero.check_engine``): value that is refused → why.
_REFUSED = {
    "zero_optimization.zenflow": "ZenFlow is not supported",
    "zero_optimization.mics_shard_size": "MiCS is not supported",
    "zero_optimization.offload_param": "offloaded parameters are not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported",
    "elasticity": "batch sizes are this config's",
    "scheduler": "the learning rate is this config's: see its section `schedule`",
}


def zero_sizes(config: Config) -> ZeroConfig:
    """The sizes that DeepSpeed works with: ``sharding.zero``, else those of the user's file, else DeepSpeed's defaults.

    Raises:
        ConfigError: the file cannot be read.
    """
    if config.sharding.zero is not None or config.sharding.deepspeed_config is None:
        return config.sharding.zero or ZeroConfig()
    zero = read_json(config.sharding.deepspeed_config).get("zero_optimization") or {}
    given = {ours: int(zero[theirs]) for theirs, ours in _SIZES.items() if zero.get(theirs, AUTO) != AUTO}
    return ZeroConfig(**given)


def read_json(path: str | Path) -> dict[str, Any]:
    """The settings in a file. Raises: ConfigError: unreadable, no JSON object, or a key that is there twice."""
    name = f"sharding.deepspeed_config: {path}"

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            if any(key == other for other, _ in pairs[:index]):
                raise ConfigError(f"{name}: the key {key!r} is there twice; keep one")
        return dict(pairs)

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(f"{name}: expected a JSON file, found: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: expected JSON, found: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def json_problems(config: Config, ours: Mapping[str, Any] | None = None) -> list[str]:
    """Every contradiction, unknown key and unsupported section of the user's file, a line each; empty without a file.

    Args:
        config: the run.
        ours: the DeepSpeed config that the run amounts to, where the world size is known: its batches are compared, too.
    """
    path = config.sharding.deepspeed_config
    if path is None:
        return []
    try:
        theirs = read_json(path)
    except ConfigError as error:
        return error.problems
    name = f"sharding.deepspeed_config: {path}"
    try:
        problems = [f"{name}: {line}" for line in _unknown(theirs)]
    except ConfigError as error:  # DeepSpeed is not installed
        return error.problems
    for key, why in _REFUSED.items():
        value = _at(theirs, key)
        if value not in (_MISSING, None, AUTO, False, {}) and not _switched_off(value):
            problems.append(f"{name}: {key}: {why}; remove it")
    for line in _contradictions(theirs, config, ours):
        problems.append(f"{name}: {line}")
    return problems


def merged(config: Config, ours: dict[str, Any]) -> dict[str, Any]:
    """``ours`` with what the user's file adds; its "auto" values are left to ours, or to DeepSpeed's defaults.

    Raises:
        ConfigError: all of ``json_problems``.
    """
    if config.sharding.deepspeed_config is None:
        return ours
    if problems := json_problems(config, ours):
        raise ConfigError(problems)
    theirs = _without_auto(read_json(config.sharding.deepspeed_config))
    # torch's optimizer is ours; clipping is the projector's, before the projection.
    for key in ("optimizer", "gradient_clipping", "scheduler"):
        theirs.pop(key, None)
    zero = theirs.get("zero_optimization", {})
    if "param_persistence_threshold" in zero:  # the name that DeepSpeed knows beside its alias
        zero["stage3_param_persistence_threshold"] = zero.pop("param_persistence_threshold")
    free = ("steps_per_print", "communication_data_type")  # ours are only defaults
    return _overlay(_overlay(ours, theirs), {key: value for key, value in ours.items() if key not in free})


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _overlay(result[key], value) if both else copy.deepcopy(value)
    return result


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != AUTO
    }


def _at(settings: Mapping[str, Any], dotted: str) -> Any:
    current: Any = settings
    for part in dotted.split("."):
        if not isinstance(current, Mapping) or part not in current:
            return _MISSING
        current = current[part]
    return current


def _switched_off(value: Any) -> bool:
    """A section that says so itself."""
    if not isinstance(value, Mapping):
        return value in (-1, 0, "none")  # mics_shard_size: -1
    return value.get("enabled") is False or value.get("device") == "none" or value.get("autotp_size") == 0


def _unknown(theirs: Mapping[str, Any]) -> Iterator[str]:
    """Keys that DeepSpeed does not know, and values that its own models refuse."""
    models = _models()
    top = _top_keys()
    for key in theirs:
        if key not in top:
            yield _unknown_line(key, key, top)
    for section, model in models.items():
        values = _at(theirs, section)
        if values is _MISSING or values == AUTO:
            continue
        if not isinstance(values, Mapping):
            yield f"{section}: expected an object, found {json.dumps(values)}"
            continue
        fields = model.model_fields
        known = {*fields, *(field.alias for field in fields.values() if field.alias)}
        for key in values:
            if key not in known:
                yield _unknown_line(f"{section}.{key}", key, known)
        inner = {key: value for key, value in values.items() if key in known and f"{section}.{key}" not in models}
        try:
            model(**inner)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                where = ".".join([section, *map(str, item["loc"])])
                yield f"{where}: {item['msg']}, found {item['input']!r}"


def _unknown_line(path: str, key: str, known: set[str]) -> str:
    near = nearest(key, known)
    return f"unknown key `{path}`" + (f"; did you mean `{near}`?" if near else "; DeepSpeed has no such key, remove it")


def _top_keys() -> set[str]:
    """The keys that the installed DeepSpeed knows at the top, from its constants."""
    from deepspeed.runtime import constants

    named = {name: value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    return {value for value in named.values() if value.islower()} | set(_SECTIONS)


def _models() -> dict[str, type[BaseModel]]:
    """Section → DeepSpeed's own pydantic model of it. Raises: ConfigError: it is not installed."""
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.offload_config import (
            DeepSpeedZeroOffloadOptimizerConfig,
            DeepSpeedZeroOffloadParamConfig,
        )
    except ImportError as error:
        raise ConfigError(
            f"sharding.deepspeed_config: needs DeepSpeed: pip install digrap-scale[deepspeed] ({error})"
        ) from error
    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }


def _contradictions(theirs: Mapping[str, Any], config: Config, ours: Mapping[str, Any] | None) -> Iterator[str]:
    """``key is X, section.key is Y; what to change`` for every key that both configs have."""
    training, sharding, optimizer = config.training, config.sharding, config.optimizer
    stage = int(sharding.backend.removeprefix("zero"))
    pairs: list[tuple[str, str, Any]] = [
        ("train_batch_size", "training.global_batch_samples", training.global_batch_samples),
        ("gradient_clipping", "training.max_grad_norm", training.max_grad_norm or 0.0),
        ("zero_optimization.stage", "sharding.backend", stage),
        ("bf16.enabled", "sharding.mixed_precision", sharding.mixed_precision == "bfloat16"),
        ("fp16.enabled", "sharding.mixed_precision", sharding.mixed_precision == "float16"),
        ("optimizer.params.lr", "optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.params.weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
        ("zero_allow_untested_optimizer", "optimizer.name (torch's own)", True),
        ("zero_force_ds_cpu_optimizer", "optimizer.name (torch's own)", False),
    ]
    if optimizer.name == "sgd":
        pairs.append(("optimizer.params.momentum", "optimizer.momentum", optimizer.momentum))
    else:
        pairs.append(("optimizer.params.betas", "optimizer.betas", list(optimizer.betas)))
        pairs.append(("optimizer.params.eps", "optimizer.eps", optimizer.eps))
    if training.micro_batch_samples is not None:
        micro = training.micro_batch_samples
        pairs.append(("train_micro_batch_size_per_gpu", "training.micro_batch_samples", micro))
    elif ours is not None:
        micro = ours["train_micro_batch_size_per_gpu"]
        pairs.append(("train_micro_batch_size_per_gpu", "training.global_batch_samples ÷ processes", micro))
    if ours is not None:
        steps = ours["gradient_accumulation_steps"]
        key = "training.global_batch_samples ÷ (micro_batch_samples × processes)"
        pairs.append(("gradient_accumulation_steps", key, steps))
    if sharding.zero is not None:
        for name, key in _SIZES.items():
            pairs.append((f"zero_optimization.{name}", f"sharding.zero.{key}", getattr(sharding.zero, key)))
    for key, own, value in pairs:
        found = _at(theirs, key)
        if found in (_MISSING, AUTO, None) or _same(found, value):
            continue
        yield f"{key} is {json.dumps(found)}, {own} is {_shown(own, value, config)}; make them agree, or remove {key}"
    kind = _at(theirs, "optimizer.type")
    if isinstance(kind, str) and kind != AUTO and kind.lower() != optimizer.name:
        yield f'optimizer.type is "{kind}", optimizer.name is {optimizer.name}; make them agree, or remove optimizer'
    yield from _offload(theirs, config)


def _offload(theirs: Mapping[str, Any], config: Config) -> Iterator[str]:
    section = _at(theirs, "zero_optimization.offload_optimizer")
    if not isinstance(section, Mapping):
        return
    device = section.get("device", "none")
    if device not in (config.sharding.offload, AUTO, None):
        yield (
            f"zero_optimization.offload_optimizer.device is {json.dumps(device)}, sharding.offload is "
            f"{config.sharding.offload}; make them agree ('nvme' is not supported), or remove offload_optimizer"
        )
    if section.get("ratio", 1.0) not in (1.0, AUTO):
        yield "zero_optimization.offload_optimizer.ratio: partial offload is not supported; set it to 1.0"
    if section.get("super_offload") is True:
        yield "zero_optimization.offload_optimizer.super_offload: SuperOffload is not supported; remove it"


def _same(found: Any, value: Any) -> bool:
    if isinstance(found, bool) or isinstance(value, bool):
        return bool(found is value)
    return bool(found == value)


def _shown(own: str, value: Any, config: Config) -> str:
    """Our value as the user knows it."""
    if own == "sharding.backend":
        return config.sharding.backend
    if own == "sharding.mixed_precision":
        return config.sharding.mixed_precision
    if own == "training.max_grad_norm" and not value:
        return "empty"
    return json.dumps(value)
