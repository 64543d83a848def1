"""A model without memory for the weights that a checkpoint holds: its shards are read later, each rank its own.

``from_pretrained`` itself does the work, on stand-ins: one number behind a tensor of the right shape (strides 0). So
renaming, tying, mismatches, buffers and what starts new (with the very random numbers) are transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from digrap_scale.models.adapters import original_name
from digrap_scale.types import Slices, StoredWeights

_PIECE = 2**24  # elements that are compared at a time


def obstacle(folder: Path, config: PreTrainedConfig) -> str | None:
    """What in a checkpoint's folder says that it can only be loaded whole, or None."""
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantized"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter, whose base model is elsewhere"
    if getattr(config, "transformers_weights", None) is not None:
        return "its config.json names the file of its weights (transformers_weights)"
    extra = [name for name in getattr(type(config), "extra_files", ()) if (folder / name).is_file()]
    return f"it has weights in a file of its own ({extra[0]})" if extra else None


def load_hollow(
    twin: PreTrainedModel, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, stored: StoredWeights
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained`` with its loading info, but for the parameters: stand-ins take the place of stored ones.

    Buffers are real (a checkpoint's are read here, whole), and so is what starts new. ``hollow_out`` comes next.

    Args:
        twin: the same architecture, maybe on the meta device.
        folder: where the checkpoint is.
        config: the model's.
        dtype: of the model's weights.
        stored: the checkpoint.
    """
    unequal = _tied_but_different(twin, stored, dtype)
    stand_ins = {
        # transformers ties two stored weights only if they are equal: stand-ins are, unless the file's differ.
        name: torch.full((), float(name in unequal), dtype=dtype).expand(shape)
        for name, shape in stored.shapes.items()
    }
    model_class: Any = type(twin)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=stand_ins,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = str(folder)  # PEFT notes it in an adapter's config
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    different = {name for name, *_ in info["mismatched_keys"]}
    for name, buffer in model.named_buffers():
        file_name = stored.file_names.get(name)
        if file_name is not None and name not in different:
            value = stored.read(file_name, 0, buffer.numel()).to(buffer.dtype, copy=True).view(buffer.shape)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, value)
    return model, info


def hollow_out(
    model: nn.Module, stored: StoredWeights, real: Iterable[str], modules: Iterable[str] | None = None
) -> dict[str, str]:
    """Puts stored parameters on the meta device, in place; ties stay ties.

    Args:
        model: of ``load_hollow``, maybe with adapters around it.
        stored: the checkpoint.
        real: names (of the model without adapters) that are not stored as they are: a new head.
        modules: endings of modules' names, as PEFT takes them, to change only what is in them; all by default.

    Returns:
        Name (of ``model``, tied ones under their first) → the file's name, for every parameter changed.
    """
    places = [
        (f"{prefix}.{key}" if prefix else key, module, key, parameter)
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    first: dict[int, str] = {}
    file_names: dict[str, str] = {}
    kept = set(real)
    for name, _, _, parameter in places:
        first.setdefault(id(parameter), name)
        stored_name = original_name(name).replace(".original_module.", ".")  # what PEFT keeps beside a copy to train
        file_name = None if stored_name in kept else stored.file_names.get(stored_name)
        if file_name is not None and (modules is None or _is_inside(name, modules)):
            file_names.setdefault(first[id(parameter)], file_name)
    replaced: dict[int, nn.Parameter] = {}
    for name, module, key, parameter in places:
        if first[id(parameter)] in file_names:
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, key, replaced[id(parameter)])
        elif modules is None:
            assert parameter.numel() < 2 or any(parameter.stride()), f"{name}: a stand-in that no file is known for"
    return file_names


def renamed(read: Slices, file_names: Mapping[str, str]) -> Slices:
    """``read`` by the model's names."""
    return lambda name, start, stop: read(file_names[name], start, stop)


def _is_inside(name: str, endings: Iterable[str]) -> bool:
    parents = name.split(".")[:-1]
    outer = [".".join(parents[:depth]) for depth in range(1, len(parents) + 1)]
    return any(module == ending or module.endswith("." + ending) for ending in endings for module in outer)


def _tied_but_different(twin: PreTrainedModel, stored: StoredWeights, dtype: torch.dtype) -> set[str]:
    """The file's names of weights that the model would tie to others, were they equal in its dtype."""
    found = set()
    for target, source in twin.all_tied_weights_keys.items():
        pair = [stored.file_names.get(name) for name in (target, source)]
        if pair[0] is None or pair[1] is None:
            continue
        if stored.shapes[pair[0]] != stored.shapes[pair[1]] or not _equal(stored, pair[0], pair[1], dtype):
            found.add(pair[0])
    return found


def _equal(stored: StoredWeights, first: str, second: str, dtype: torch.dtype) -> bool:
    numel = math.prod(stored.shapes[first])
    for start in range(0, numel, _PIECE):
        pieces = (stored.read(name, start, min(start + _PIECE, numel)).to(dtype) for name in (first, second))
        if not torch.equal(*pieces):
            return False
    return True


def _generation_config(folder: Path) -> GenerationConfig:
    """As ``from_pretrained`` sets it: from its own file, or what config.json says of it."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
