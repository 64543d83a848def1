"""Low-rank adapters through PEFT: LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from digrap_scale.config.schema import LoraConfig
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.models.names import nearest

PREFIX = "base_model.model."
SAVED_COPY = ".modules_to_save.default"


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wraps the model: its own weights freeze, adapters and ``modules_to_save`` train, in the model's dtype.

    Raises:
        ConfigError: ``target_modules`` or ``modules_to_save`` matches no module, or one that cannot be adapted.
    """
    names = [name for name, _ in model.named_modules() if name]
    problems = [
        f"model.lora.modules_to_save: {ending!r} matches no module; nearest: {nearest(ending, names)}"
        for ending in lora.modules_to_save
        if not any(name == ending or name.endswith("." + ending) for name in names)
    ]
    if problems:
        raise ConfigError(problems)
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # PEFT divides by it: any number does
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
    )
    try:
        # One dtype throughout: FSDP2 shards only blocks whose parameters agree in dtype.
        return get_peft_model(model, settings, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
        line = " ".join(str(error).split())
        close = "; ".join(f"nearest to {target!r}: {nearest(target, names)}" for target in targets)
        raise ConfigError(f"model.lora.target_modules: {line} ({close})") from error


def original_name(name: str) -> str:
    """A wrapped model's parameter name as the model itself has it; adapters' own names only lose the prefix."""
    return name.removeprefix(PREFIX).replace(SAVED_COPY, "").replace(".base_layer.", ".")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load a saved adapter's weights (``adapter_model.safetensors``) into a model that ``add_lora`` has prepared.

    Raises:
        CheckpointError: no adapter there, or one of another shape.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected adapter_model.safetensors (model.lora is set), found none")
    try:
        tensors = load_file(file)
        _give_memory(model, set(tensors))
        outcome: Any = set_peft_model_state_dict(model, tensors)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{file}: does not fit the model: {' '.join(str(error).split())[:400]}") from error
    if outcome.unexpected_keys:
        raise CheckpointError(f"{file}: {outcome.unexpected_keys[0]!r} is no part of the model's adapter")


def _give_memory(model: nn.Module, saved: set[str]) -> None:
    """Real tensors for copies on the meta device that the adapter's file has values for (what is not there stays)."""
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{key}"
            if parameter.is_meta and SAVED_COPY in name and name.replace(SAVED_COPY, "") in saved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
