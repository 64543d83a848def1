"""The names that transformers gives to a file's tensors when it loads them into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from digrap_scale.errors import CheckpointError

_SHOWN_CHARACTERS = 300


def loaded_names(model: Any, file_names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Model name → the file's name, by the renaming that transformers applies when it loads the file into ``model``
    (a plain transformers model, maybe on the meta device); and the file's names that it converts, not only renames."""
    # Not exported at transformers' top level, but shared with PEFT and pinned by tests/reference.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    meta, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    converted_names = []
    for file_name in file_names:
        model_name, converted = rename_source_key(file_name, renamings, converters, prefix, meta)
        if model_name not in meta and file_name in meta:  # as it does: the model's own names need no renaming
            model_name, converted = rename_source_key(file_name, [], [], prefix, meta)
        if converted is not None or names.setdefault(model_name, file_name) != file_name:
            converted_names.append(file_name)
    return names, converted_names


def names_by_config(folder: Path, file_names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Model name → the file's name, for the model that a folder's config.json names, and its tied weights (alias → name in
    the model); no weights are made.

    A folder without config.json, or of a model that is not transformers' own, keeps its names.

    Raises:
        CheckpointError: a damaged config.json, or weights that transformers converts as it loads them.
    """
    file_names = list(file_names)
    if not (folder / "config.json").is_file():
        return {name: name for name in file_names}, {}
    import transformers

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wanted = (settings.get("architectures") or [None])[0]
        architecture = getattr(transformers, str(wanted), None)
        if architecture is None:
            return {name: name for name in file_names}, {}
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = architecture(config)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:_SHOWN_CHARACTERS]  # transformers may list all models that it knows
        raise CheckpointError(f"{folder / 'config.json'}: no model can be described by it ({reason})") from error
    names, converted = loaded_names(model, file_names)
    if converted:
        raise CheckpointError(
            f"{folder}: transformers converts {converted[0]} as it loads it; save the model with save_pretrained first, "
            "so that file and model have the same tensors"
        )
    return names, dict(model.all_tied_weights_keys)
