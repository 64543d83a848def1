"""θ₀ as ``attach`` is given it (a path, a mapping, a word) → this rank's slice of every layer's reference.

Shapes: L layers, N local elements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.reference.names import match_names
from digrap_scale.reference.placement import HeldReference, ReferenceShards
from digrap_scale.reference.store import SafetensorsReader, check_tied, load_slices
from digrap_scale.reference.stream import Source, StreamedReference, find_source
from digrap_scale.types import PLAIN_LORA_STARTS, ShardSpec

DEFAULT_BUFFER_BYTES = 256 << 20
Reference = str | Path | Mapping[str, torch.Tensor]
# Weights that PEFT starts at (or multiplies to) zero: their pre-trained value is "no change", so d = θ.
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
# DoRA's magnitudes start at the norms of the pre-trained weights' rows: that first value is "no change".
_MAGNITUDE = re.compile(r"(^|\.)lora_magnitude_vector(\.|$)")


def resolve_reference(
    reference: Reference | None,
    module: nn.Module,
    specs: Sequence[ShardSpec],
    weights: Sequence[torch.Tensor],
    aliases: Mapping[str, Sequence[str]],
    rename: Mapping[str, str],
    exempt: set[str],
    placement: str = "device",
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
) -> tuple[ReferenceShards, list[bool]]:
    """This rank's part of θ₀, and for each layer whether there is a θ₀ at all.

    Args:
        reference: see ``attach``.
        module: the unwrapped model, for the names that its class has in files.
        specs: the layers that train, and what this rank holds of them.
        weights: [N] this rank's weights, a layer each.
        aliases: layer name → all names of that parameter in the model (several if tied).
        rename: regex → replacement, from parameter names to the file's.
        exempt: layers that have no reference.
        placement: ``device``, ``cpu`` or ``stream``.
        buffer_bytes: of a streamed reference.

    Raises:
        ConfigError: no reference where layers need one, a mapping of none of them, or a streamed one that is no file.
        CheckpointError: the reference does not fit the model.
    """
    if rename and (reference is None or isinstance(reference, Mapping) or str(reference) in ("initial", "zero")):
        word = "a mapping" if isinstance(reference, Mapping) else "adapters at zero" if reference is None else reference
        raise ConfigError(f"reference.rename: maps names of a file, but the reference is {word}; remove it")
    slices: list[torch.Tensor | None] = [None] * len(weights)
    adapters = {spec.name for spec in specs if _ADAPTER.search(spec.name)}
    magnitudes = {spec.name for spec in specs if _MAGNITUDE.search(spec.name) and spec.name not in exempt}
    if placement == "stream" and magnitudes and str(reference) != "zero":
        raise ConfigError(
            "reference_placement: 'stream' reads a file, and DoRA's magnitudes have their reference in memory (their first "
            "value); use 'device' or 'cpu'"
        )
    given = reference if isinstance(reference, Mapping) else {}
    if str(reference) != "initial" and any(
        name not in exempt and not any(alias in given for alias in aliases.get(name, [name])) for name in adapters
    ):
        _refuse_moved_bases(module)
    others = [s for s in specs if s.name not in adapters and s.name not in magnitudes and s.name not in exempt]
    projected = [spec.name not in exempt for spec in specs]
    if reference is None:
        if others:
            raise ConfigError(
                f"a reference is needed for {len(others)} layers ({others[0].name}, …): pass reference='initial', "
                "the path of the pre-trained safetensors, or a mapping of names to tensors"
            )
    elif isinstance(reference, Mapping):
        for layer, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
            named = next((name for name in aliases.get(spec.name, [spec.name]) if name in reference), None)
            if named is not None and spec.name not in exempt:
                slices[layer] = _slice_of(named, reference[named], spec).to(weight.device)
            projected[layer] &= named is not None or spec.name in adapters or spec.name in magnitudes
        if not any(projected):
            raise ConfigError(f"reference: none of its {len(reference)} names is a trained parameter of the model")
    elif str(reference) == "initial":
        slices = [weight.clone() if on else None for weight, on in zip(weights, projected, strict=True)]
    elif str(reference) != "zero" and others:
        reader = SafetensorsReader(reference)
        file_names = match_names(module, reader, others, aliases, rename)
        devices = {weight.device for weight in weights}
        assert len(devices) == 1, f"weights on several devices: {devices}"
        device = devices.pop()
        if placement == "stream":
            return _stream(reader, specs, weights, file_names, buffer_bytes, device), projected
        slices = load_slices(reader, specs, file_names, device)
    if isinstance(reference, Mapping) or str(reference) != "zero":
        for layer, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
            if spec.name in magnitudes and slices[layer] is None:
                slices[layer] = weight.clone()
    if placement == "stream" and any(tensor is not None for tensor in slices):
        raise ConfigError(
            "reference_placement: 'stream' reads the reference from a safetensors file in each step, but the reference "
            "given is in memory already; pass a path, or placement 'device' or 'cpu'"
        )
    # Weights in bfloat16 are the checkpoint's, rounded: so is their reference, or d would start as rounding noise.
    slices = [
        tensor.to(weight.dtype) if tensor is not None and tensor.element_size() > weight.element_size() else tensor
        for tensor, weight in zip(slices, weights, strict=True)
    ]
    if placement == "cpu":
        slices = [None if tensor is None else tensor.cpu() for tensor in slices]
    return HeldReference(slices, placement), projected


def _refuse_moved_bases(module: nn.Module) -> None:
    """Raises: ConfigError: adapters begin at a part of the pre-trained weights, so that zero would be without that part."""
    for part in module.modules():
        configs = getattr(part, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            start = getattr(config, "init_lora_weights", True)
            if start not in PLAIN_LORA_STARTS:
                raise ConfigError(
                    f"reference: adapter {name!r} begins at a part of the pre-trained weights (init_lora_weights: {start!r}), "
                    "and its reference would be zero, the model without that part; pass reference='initial'"
                )


def _stream(
    reader: SafetensorsReader,
    specs: Sequence[ShardSpec],
    weights: Sequence[torch.Tensor],
    file_names: Mapping[str, Sequence[str]],
    buffer_bytes: int,
    device: torch.device,
) -> StreamedReference:
    sources: list[Source | None] = []
    for spec in specs:
        names = file_names.get(spec.name)
        if not names:
            sources.append(None)
            continue
        check_tied(reader, spec, names)
        sources.append(find_source(reader, names[0], spec.start, spec.stop))
    return StreamedReference(sources, [weight.dtype for weight in weights], buffer_bytes, device)


def _slice_of(name: str, tensor: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    if hasattr(tensor, "full_tensor"):
        raise ConfigError(f"reference: {name} is sharded; pass full tensors, or reference='initial'")
    if tuple(tensor.shape) != spec.shape:
        raise CheckpointError(f"reference: {name}: expected shape {list(spec.shape)}, found {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"reference: {name}: expected a floating dtype, found {tensor.dtype}")
    return tensor.detach().reshape(-1)[spec.start : spec.stop].clone()
