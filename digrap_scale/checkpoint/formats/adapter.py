"""PEFT adapters: ``adapter_model.safetensors`` beside ``adapter_config.json``, or within a checkpoint of a model in training."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from digrap_scale.checkpoint.formats.base import Source
from digrap_scale.checkpoint.formats.huggingface import tensors_of
from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import read_headers

STEM = "adapter_model"
CONFIG = "adapter_config.json"
# Of the base: an adapter's folder has none (PEFT's own neither), and transformers would take it for a model's.
_OF_THE_BASE = ("config.json", "generation_config.json")
_LORA = re.compile(r"base_model\.model\..+\.lora_(?:embedding_)?(?:A|B|magnitude_vector)(?P<rest>\..+)?")
_TRAINED = "default"  # what PEFT calls an adapter in training, unless told otherwise


def detect(path: Path) -> bool:
    return path.is_dir() and (path / CONFIG).is_file() and (path / f"{STEM}.safetensors").is_file()


def read(path: Path) -> Source:
    """Raises: CheckpointError."""
    return Source(path, "adapter", tensors_of(read_headers(path, STEM)), companions=path, metadata={"stem": STEM})


def holds_adapter(source: Source) -> bool:
    """Whether a checkpoint of another format has LoRA's parts among its tensors, under PEFT's names."""
    return source.format != "adapter" and any(_LORA.fullmatch(name) for name in source.tensors)


def own_adapter(source: Source, config_folder: Path | None) -> Source:
    """The adapter of such a checkpoint alone, under the names that PEFT gives it in a file; the base may be there or not.

    Args:
        source: the checkpoint of a PEFT model in training, or an adapter that was stored in another format.
        config_folder: where its adapter_config.json is.

    Raises:
        CheckpointError: there is no adapter_config.json, or the adapter is not a LoRA one, or none named "default".
    """
    if config_folder is None or not (config_folder / CONFIG).is_file():
        raise CheckpointError(
            f"{source.path}: holds a PEFT adapter, and no {CONFIG} goes with it; name its folder by --companions"
        )
    config = read_config(config_folder / CONFIG)
    if config["peft_type"] != "LORA" or config.get("trainable_token_indices"):
        raise CheckpointError(
            f"{config_folder / CONFIG}: peft_type {config['peft_type']} or trained tokens cannot be taken out of a training "
            "checkpoint here, only LORA; save the adapter with peft"
        )
    adapter = replace(
        source, format="adapter", aliases={}, companions=config_folder, left_out=_OF_THE_BASE, metadata={"stem": STEM}
    )
    rests = {match["rest"] or "" for name in source.tensors if (match := _LORA.fullmatch(name)) is not None}
    if rests <= {"", ".weight"}:
        return adapter  # names of a file already
    if not rests <= {f".{_TRAINED}", f".{_TRAINED}.weight"}:
        raise CheckpointError(
            f"{source.path}: expected one adapter, named {_TRAINED}, found {', '.join(sorted(rests))}"
        )
    tensors = {}
    for name, tensor in source.tensors.items():
        stored = _file_name(name, str(config.get("bias", "none")))
        if stored is not None:
            tensors[stored] = replace(tensor, name=stored)
    return replace(adapter, tensors=tensors)


def _file_name(name: str, bias: str) -> str | None:
    """A parameter's name in the model in training → the name in the adapter's file, or None: the base's."""
    match = _LORA.fullmatch(name)
    if match is not None:
        stored = name.removesuffix(match["rest"]) + match["rest"].removeprefix(f".{_TRAINED}")
        return stored.removesuffix(".weight") if "lora_magnitude_vector" in name else stored
    if f".modules_to_save.{_TRAINED}." in name:
        return name.replace(f".modules_to_save.{_TRAINED}.", ".")
    of_base = name.endswith(".bias") and ".original_module." not in name
    return name if bias == "all" and of_base else None


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises: CheckpointError."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable adapter config ({type(error).__name__}: {error})") from error
    return config
