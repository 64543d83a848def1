"""A config's model as a list of tensors: how large, which train, in which group and block, with which reference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from digrap_scale.config import Config
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.file_names import loaded_names
from digrap_scale.method.build import METHODS
from digrap_scale.models.adapters import original_name
from digrap_scale.models.build import head_names, resolve_folder
from digrap_scale.models.check import outline
from digrap_scale.models.freeze import freeze_body
from digrap_scale.models.groups import build_groups
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.sharding.fsdp2 import blocks_to_wrap

ROOT_BLOCK = -1
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The adapters that start at "no change": see reference.resolve, which has no file read for them.
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_MAGNITUDE = re.compile(r"(^|\.)lora_magnitude_vector(\.|$)")


@dataclass(frozen=True)
class Weight:
    """One parameter, tied ones once.

    Attributes:
        name: in the unwrapped model.
        shape: its full shape.
        trained: whether the optimizer steps it.
        group: number of its parameter group (of those that train).
        block: number of the block that FSDP2 shards it with, or ``ROOT_BLOCK``.
        reference_bytes: bytes an element of θ₀ takes that is kept in memory; 0 if it is zero, absent or not kept.
        projected: whether the method looks at it.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    group: int
    block: int
    reference_bytes: int
    projected: bool

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedModel:
    """What a config's model is made of.

    Attributes:
        module: on the meta device, adapters added, parameters frozen.
        folder: where its config.json is.
        weights: in the model's order.
        buffer_bytes: of its buffers, whole on every rank.
        notes: what was assumed, a line each.
    """

    module: nn.Module
    folder: Path
    weights: list[Weight]
    buffer_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[Weight]:
        """The weights that train."""
        return [weight for weight in self.weights if weight.trained]

    @property
    def frozen(self) -> list[Weight]:
        """The others."""
        return [weight for weight in self.weights if not weight.trained]


def read_model(config: Config, num_classes: int | None) -> PlannedModel:
    """The model that ``config`` names, from its config.json (and, of a local folder, the headers of its safetensors).

    A hub id downloads ``config.json`` alone.

    Args:
        config: the run.
        num_classes: of ``data.classes``, or None.

    Raises:
        ConfigError: as building the model would.
    """
    folder = resolve_folder(config.model, only_config=True)
    module, _ = outline(config, folder, num_classes)
    notes: list[str] = []
    new = _new_names(config, module, notes)
    head = getattr(config.method, "head", None)
    if head is not None and not head:  # linear probing of what starts new
        freeze_body(module, config.method, new)
    # As `attach_projector` has it: to measure layers takes the reference, whatever the method.
    referenced = METHODS[config.method.name].uses_reference or config.logging.layers_every_steps is not None
    groups = build_groups(module, config.optimizer, new if head is not None else ())
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    block_of = _blocks(module, config, notes)
    named = list(module.named_parameters())
    wanted = [
        name for name, p in named if p.requires_grad and referenced and name not in new and not _ADAPTER.search(name)
    ]
    widths = _reference_widths(config, folder, module, wanted, notes)
    weights = [
        Weight(
            name,
            tuple(p.shape),
            p.requires_grad,
            group_of.get(id(p), -1),
            block_of.get(id(p), ROOT_BLOCK),
            widths.get(name, 0),
            p.requires_grad and referenced and name not in new,
        )
        for name, p in named
    ]
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return PlannedModel(module, folder, weights, buffer_bytes, notes)


def _new_names(config: Config, module: nn.Module, notes: list[str]) -> set[str]:
    """Names of the head's parameters, if it starts new: its size is not the checkpoint's."""
    settings = config.model
    if settings.task != "classification" or not settings.new_head:
        return set()
    base: Any = getattr(module, "get_base_model", lambda: module)()
    names = head_names(base.config, settings)
    notes.append("model.new_head: the head is taken to start new; whether it does shows in the checkpoint")
    return {name for name, _ in module.named_parameters() if original_name(name) in names}


def _blocks(module: nn.Module, config: Config, notes: list[str]) -> dict[int, int]:
    """id of a parameter → its block under FSDP2, by ``fully_shard``'s rule: an inner block's is not an outer one's."""
    try:
        blocks = blocks_to_wrap(module, config.sharding.wrap)
    except ConfigError as error:
        if config.sharding.backend == "fsdp2":
            raise
        notes.append(f"fsdp2: taken as one block ({error.problems[0]})")
        return {}
    found: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            found.setdefault(id(parameter), number)
    return found


def _reference_widths(
    config: Config, folder: Path, module: nn.Module, wanted: Sequence[str], notes: list[str]
) -> dict[str, int]:
    """Bytes an element of each of ``wanted``'s reference: as in its file, but no wider than the weights that are stepped."""
    source = config.reference.source
    stepped = stepped_bytes(config)
    magnitudes = {name: stepped for name in wanted if _MAGNITUDE.search(name)} if source != "zero" else {}
    lora = config.model.lora
    if source == "pretrained" and lora is not None and not lora.modules_to_save:
        return magnitudes
    if source == "zero":
        return {}
    if source == "initial":
        every = [name for name, p in module.named_parameters() if p.requires_grad]
        return {name: stepped for name in every if name in wanted or _ADAPTER.search(name)}
    path = folder if source == "pretrained" else Path(source)
    try:
        reader = SafetensorsReader(path)
    except CheckpointError as error:
        if source != "pretrained":
            raise
        dtype = _config_dtype(module)
        notes.append(f"reference: taken to be {dtype}, as config.json says; its weights are not here ({error})")
        return {name: min(stepped, dtype.itemsize) for name in wanted} | magnitudes
    base = getattr(module, "get_base_model", lambda: module)()
    file_names, _ = loaded_names(base, reader.names()) if lora is None else ({}, [])
    usual = max((_WIDTHS.get(code, 4) for code in reader.dtypes.values()), default=4)
    found = {}
    for name in wanted:
        plain = original_name(name)
        code = reader.dtypes.get(file_names.get(plain, plain))
        found[name] = min(stepped, _WIDTHS.get(code, 4) if code is not None else usual)
    return found | magnitudes


def _config_dtype(module: nn.Module) -> torch.dtype:
    base = getattr(module, "get_base_model", lambda: module)()
    dtype = getattr(base.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def model_bytes(config: Config) -> int:
    """Bytes an element of ``model.dtype``."""
    return 2 if config.model.dtype == "bfloat16" else 4


def stepped_bytes(config: Config) -> int:
    """Bytes an element of what the optimizer steps: ZeRO's masters are float32."""
    return 4 if config.sharding.backend.startswith("zero") else model_bytes(config)


def compute_bytes(config: Config) -> int:
    """Bytes an element of the weights that forward and backward compute with."""
    return model_bytes(config) if config.sharding.mixed_precision == "none" else 2
