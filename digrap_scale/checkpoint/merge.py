"""LoRA adapters merged into their base, tensor by tensor: W + s·B·A, a few rows at a time (Hu et al. 2021, arXiv 2106.09685).

Computed in float32 and rounded once to the base's dtype. PEFT's ``merge_and_unload`` does the same on a whole model in memory.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key  # not exported higher up; pinned by the tests of patterns

from digrap_scale.checkpoint.formats.adapter import CONFIG, read_config
from digrap_scale.checkpoint.formats.base import LazyTensor, Source
from digrap_scale.errors import CheckpointError
from digrap_scale.file_names import names_by_config
from digrap_scale.types import PLAIN_LORA_STARTS

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
# Settings under which the merged weight is another than W + s·B·A, or the base another than the stored one.
_REFUSED = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "megatron_config",
)


@dataclass(frozen=True)
class _Lora:
    """The low-rank parts of one module: A [r, in], B [out, r], magnitude [out] (DoRA) or None."""

    a: LazyTensor
    b: LazyTensor
    scale: float
    transposed: bool
    magnitude: LazyTensor | None


def merge_adapter(base: Source, adapter: Source) -> Source:
    """The base with an adapter merged in; nothing is computed before it is read.

    Args:
        base: the weights that the adapter was trained on, as transformers saved them.
        adapter: a PEFT LoRA adapter (rsLoRA, DoRA, ranks and alphas by pattern, ``modules_to_save`` included).

    Raises:
        CheckpointError: another kind of adapter, or one whose modules the base does not have.
    """
    names, tied = names_by_config(base.companions or base.path, base.tensors)
    return _merge(base, adapter, _config((adapter.companions or adapter.path) / CONFIG), names, tied)


def merge_own(source: Source, config_folder: Path | None) -> Source:
    """A checkpoint of a PEFT model in training, which holds base and adapter under their names there, as the merged model.

    Args:
        source: the checkpoint.
        config_folder: where its adapter_config.json is.

    Raises:
        CheckpointError: it holds no adapter named "default", or there is no adapter_config.json.
    """
    if config_folder is None:
        raise CheckpointError(f"{source.path}: no {CONFIG} goes with it; name its folder by --companions")
    config = _config(config_folder / CONFIG)
    base: dict[str, LazyTensor] = {}
    trained: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        own = name.removeprefix(_PREFIX)
        if "lora_" in own or ".modules_to_save." in own:
            trained[re.sub(r"\.default(?=\.|$)", "", own)] = tensor
        else:
            own = _in_base(own)
            base[own] = replace(tensor, name=own)
    if not trained or not all(".default." in f"{tensor.name}." for tensor in trained.values()):
        raise CheckpointError(f"{source.path}: expected the weights of an adapter named default beside its base's")
    aliases = {_in_base(alias): _in_base(name) for alias, name in source.aliases.items()}
    own_base = replace(source, tensors=base, aliases=aliases, left_out=(CONFIG,))
    return _merge(own_base, replace(source, tensors=trained), config, {name: name for name in base}, aliases)


def _in_base(name: str) -> str:
    """A base weight's name without what PEFT puts around it."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _merge(
    base: Source, adapter: Source, config: Mapping[str, Any], file_names: Mapping[str, str], tied: Mapping[str, str]
) -> Source:
    parts: dict[str, dict[str, LazyTensor]] = {}
    replaced: dict[str, LazyTensor] = {}
    for name, tensor in adapter.tensors.items():
        own = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(own)
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" in own:
            raise CheckpointError(
                f"{adapter.path}: {name}: no part of LoRA that can be merged here; merge it with peft"
            )
        else:  # trained in full beside the adapters: modules_to_save, biases
            replaced[own.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    # Before the others: PEFT stores a copy of an adapted embedding, which is among those that replace the base's.
    for module in parts:
        if f"{module}.weight" in {*tied, *tied.values()}:
            raise _would_change_both(adapter, f"adapts {module}, whose weight")
    tensors = dict(base.tensors)
    for own, tensor in replaced.items():
        name = file_names.get(own, own)
        if own in tied.values() and not config.get("ensure_weight_tying"):
            raise _would_change_both(adapter, f"trains {own} in full, which")
        if name in tensors and tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{adapter.path}: {tensor.name}: expected shape {list(tensors[name].shape)} as in {base.path}, "
                f"found {list(tensor.shape)}"
            )
        tensors[name] = replace(tensor.to(tensors[name].dtype) if name in tensors else tensor, name=name)
    for module, found in parts.items():
        name = _find(f"{module}.weight", file_names, base, adapter)
        tensors[name] = _merged(tensors[name], _lora(module, found, config, adapter), adapter)
    return replace(base, tensors=tensors)


def _would_change_both(adapter: Source, what: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.path}: {what} the model ties to another: merged, both would change; set tie_word_embeddings to false in "
        "the base and save it with both weights first"
    )


def _config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    kind = config["peft_type"]
    advice = "merge it with peft's merge_and_unload"
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind} cannot be merged here, only LORA; {advice}")
    for key in _REFUSED:
        if config.get(key):
            raise CheckpointError(f"{path}: {key}: {config[key]!r} cannot be merged here; {advice}")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_LORA_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights: {start!r} changes the base's weights, so the stored ones do not fit; {advice}"
        )
    return config


def _find(name: str, file_names: Mapping[str, str], base: Source, adapter: Source) -> str:
    if name in file_names:
        return file_names[name]
    near = difflib.get_close_matches(name, file_names, n=1, cutoff=0.0)
    hint = f" (nearest: {near[0]})" if near else ""
    raise CheckpointError(
        f"{adapter.path}: adapts {name}, which {base.path} does not have{hint}; name the base that it was trained on"
    )


def _lora(module: str, found: Mapping[str, LazyTensor], config: Mapping[str, Any], adapter: Source) -> _Lora:
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    lacking = [name for name in names if name not in found]
    if lacking:
        raise CheckpointError(f"{adapter.path}: {module} has no {lacking[0]}; fetch the adapter again")
    a, b = found[names[0]], found[names[1]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{adapter.path}: {module}: expected two matrices, A [r, in] and B [out, r], found {list(a.shape)} and "
            f"{list(b.shape)}; merge other layers with peft"
        )
    rank = a.shape[0]
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha", 8))
    magnitude = found.get("lora_magnitude_vector")
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    if bool(config.get("use_dora")) != (magnitude is not None) or magnitude is not None and transposed:
        raise CheckpointError(
            f"{adapter.path}: {module}: DoRA is merged here for linear layers with their magnitudes only; merge it with peft"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return _Lora(a, b, scale, transposed, magnitude)


def _merged(weight: LazyTensor, lora: _Lora, adapter: Source) -> LazyTensor:
    shape = (lora.b.shape[0], lora.a.shape[1])
    if weight.shape != (shape[::-1] if lora.transposed else shape):
        raise CheckpointError(
            f"{adapter.path}: {lora.a.name}: expected a weight of shape {list(shape)}"
            f"{' transposed' if lora.transposed else ''}, found {weight.name} of {list(weight.shape)}"
        )
    columns = weight.shape[1]
    held: list[torch.Tensor] = []  # A and B, while the weight is read

    def read(start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return weight.read(start, stop)
        first, last = start // columns, -(-stop // columns)
        rows = weight.read(first * columns, last * columns).view(-1, columns)
        if not held:
            held.extend(_matrix(part) for part in (lora.a, lora.b))
        a, b = held
        if stop == weight.numel:
            held.clear()  # read to its end: an adapter of many modules is not held at once
        delta = (b @ a[:, first:last]).T if lora.transposed else b[first:last] @ a
        sums = rows.to(delta.dtype) + delta.mul_(lora.scale)
        if lora.magnitude is not None:
            # Liu et al. 2024, arXiv 2402.09353: m · (W + sBA) / ‖W + sBA‖ by output row.
            sizes = lora.magnitude.read(0, lora.magnitude.numel)[first:last].to(sums.dtype)
            sums *= (sizes / sums.norm(dim=1)).unsqueeze(1)
        return sums.to(weight.dtype).reshape(-1)[start - first * columns : stop - first * columns]

    return replace(weight, read=read)


def _matrix(part: LazyTensor) -> torch.Tensor:
    compute = torch.float64 if part.dtype == torch.float64 else torch.float32
    return part.read(0, part.numel).view(part.shape).to(compute)
