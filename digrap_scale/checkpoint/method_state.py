"""A method's state (``Projector.state_dict``) as one safetensors file: ``KIND/PARAMETER`` → tensor, numbers in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from digrap_scale.checkpoint.atomic import atomic_file
from digrap_scale.errors import CheckpointError

_NUMBERS = ("method", "step", "scalars")
_MAPPINGS = ("previous", "last_step")


def method_tensors(state: Mapping[str, Any], *, previous: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a method's state; the weights before the last step only if ``previous`` (ours are sharded)."""
    kinds = {
        **state["layers"],
        "last_step": state["last_step"],
        **({"previous": state["previous"]} if previous else {}),
    }
    tensors = {f"{kind}/{name}": value.clone() for kind, of in kinds.items() for name, value in of.items()}
    return tensors, {"method": json.dumps({key: state[key] for key in _NUMBERS})}


def write_method_state(file: Path, state: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
    """Write a gathered state, with ``notes`` in its header; the file appears when it is whole. Raises: SaveError."""
    tensors, header = method_tensors(state, previous=True)
    with atomic_file(file) as beside:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, beside, metadata={**(notes or {}), **header}
        )


def read_method_state(file: Path) -> dict[str, Any]:
    """The inverse of ``write_method_state`` (without ``previous`` in the file, it is empty).

    Raises:
        CheckpointError: the file cannot be read, or is not a method's state.
    """
    tensors, notes = read_tensors(file)
    try:
        numbers: dict[str, Any] = json.loads(notes["method"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: its header lacks the method's name and numbers") from error
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        layers.setdefault(kind, {})[name] = tensor
    mappings = {kind: layers.pop(kind, {}) for kind in _MAPPINGS}
    return {**numbers, "layers": layers, **mappings}


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises: CheckpointError."""
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
