"""From a checkpoint's tensor names to the model's parameter names, and what differs between the two."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.file_names import loaded_names
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.safetensors_file import FLOATS
from digrap_scale.types import ShardSpec


def match_names(
    model: nn.Module,
    reader: SafetensorsReader,
    specs: Sequence[ShardSpec],
    aliases: Mapping[str, Sequence[str]],
    rename: Mapping[str, str],
    not_projected: Iterable[str] = (),
) -> dict[str, list[str]]:
    """Parameter name → the file's name(s) for it, checked: every layer found, shapes equal, dtypes floating.

    Args:
        model: the unwrapped model; a transformers model brings its own renaming rules between file and modules.
        reader: the open checkpoint.
        specs: the layers that train.
        aliases: layer name → all names of that parameter in the model (several if tied).
        rename: regex → replacement on the model's parameter names, applied in order before anything else.
        not_projected: names of layers that need no reference (a new head); they are left out.

    Raises:
        ConfigError: a ``rename`` whose regex is found in no name.
        CheckpointError: layers without a tensor, or with one of another shape; the message is the whole diff.
    """
    exempt = set(not_projected)
    # Frozen parameters count, too: a rename need not change with what is trained.
    everything = [name for name, _ in model.named_parameters()]
    _refuse_idle(rename, everything + [alias for spec in specs for alias in aliases.get(spec.name, [spec.name])])
    by_model_name = _file_names_by_model_name(model, reader)
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    reshaped: list[str] = []
    for spec in specs:
        if spec.name in exempt:
            continue
        names = [_find(alias, reader, by_model_name, rename) for alias in aliases.get(spec.name, [spec.name])]
        present = list(dict.fromkeys(name for name in names if name is not None))
        if not present:
            missing.append(spec.name)
            continue
        for name in present:
            if reader.shapes[name] != spec.shape:
                reshaped.append(
                    f"{spec.name}: expected shape {list(spec.shape)}, found {list(reader.shapes[name])} in {name}"
                )
            elif reader.dtypes[name] not in FLOATS:
                reshaped.append(f"{spec.name}: expected {', '.join(FLOATS)}, found {reader.dtypes[name]} in {name}")
        found[spec.name] = present
    if missing or reshaped:
        raise CheckpointError(_diff(reader, missing, reshaped, {name for names in found.values() for name in names}))
    return found


def _refuse_idle(rename: Mapping[str, str], names: Sequence[str]) -> None:
    """A regex that matches nothing is a slip: names would go on unchanged, as if it were not there."""
    for pattern, replacement in rename.items():
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"reference.rename: {pattern!r} matches no parameter of the model{hint}")
        names = [re.sub(pattern, replacement, name) for name in names]


def _find(
    name: str, reader: SafetensorsReader, by_model_name: Mapping[str, str], rename: Mapping[str, str]
) -> str | None:
    for pattern, replacement in rename.items():
        name = re.sub(pattern, replacement, name)
    # PEFT's marks around a module that is trained in full beside the adapters.
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    if name in by_model_name:
        return by_model_name[name]
    return name if name in reader else None


def _diff(reader: SafetensorsReader, missing: list[str], reshaped: list[str], used: set[str]) -> str:
    spare = [name for name in reader.names() if name not in used]
    lines = [
        f"{reader.path}: this reference does not fit the model ({len(missing)} missing, {len(reshaped)} different)"
    ]
    for name in missing:
        near = difflib.get_close_matches(name, spare, n=1, cutoff=0.5)
        lines.append(f"  missing: {name}" + (f" (nearest in the file: {near[0]})" if near else ""))
    lines += [f"  different: {line}" for line in reshaped]
    lines += [f"  not used: {name}" for name in spare]
    lines.append("  names that differ can be mapped by reference.rename (regex: replacement)")
    return "\n".join(lines)


def _file_names_by_model_name(model: nn.Module, reader: SafetensorsReader) -> dict[str, str]:
    """The renaming that transformers applies when it loads this file, turned round; identity for other models."""
    import transformers

    unwrap = getattr(model, "get_base_model", None)  # PEFT's wrapper
    if unwrap is not None:
        model = unwrap()
    prefix, found = "", model
    if not isinstance(model, transformers.PreTrainedModel):
        inside = _outermost(model, transformers.PreTrainedModel)
        if len(inside) != 1:
            return {}
        ((prefix, found),) = inside  # in a module of somebody's own, a LightningModule
    names = loaded_names(_plain_twin(found), reader.names())[0]
    return {**names, **{prefix + name: of_file for name, of_file in names.items()}}


def _outermost(model: nn.Module, kind: type[nn.Module], prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The modules of a kind that are in no other one of it, each with the prefix of its parameters' names."""
    if isinstance(model, kind):
        return [(prefix, model)]
    children = [_outermost(child, kind, f"{prefix}{name}.") for name, child in model.named_children()]
    return [found for several in children for found in several]


def _plain_twin(model: Any) -> Any:
    """The same architecture without weights and wrappers (FSDP2 changes a module's class, ZeRO-3 its parameters)."""
    # Told by the class's name: this room knows no process group.
    plain = next(cls for cls in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in cls.__mro__))
    from transformers.modeling_utils import set_zero3_state

    # Where transformers knows of a ZeRO-3 config (its Trainer's), it would partition the twin's parts and initialize them.
    with torch.device("meta"), set_zero3_state():
        return plain(model.config)


def tied_aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter → all its names (``named_parameters`` gives a tied parameter once)."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = first.setdefault(id(parameter), name)
        aliases.setdefault(key, []).append(name)
    return aliases
