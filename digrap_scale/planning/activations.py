"""What one micro-batch's forward keeps for backward, estimated: by a trace without memory, or by a formula.

The trace runs the model's forward on fake tensors, which have shapes and no data, and adds up what autograd saves. It
knows neither fused kernels of another device nor the allocator's rounding. The formula is for models whose forward
depends on data (generative ones), Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1 without the attention matrix, which
fused attention does not keep): 34 bytes a token and hidden element of each layer in half precision; beside it the logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from digrap_scale.config import Config
from digrap_scale.planning.weights import PlannedModel, compute_bytes

_FORMULA_BYTES = 34  # of a token, a hidden element and a layer, at two bytes an activation
_INPUT_BYTES = 2  # of those, what a layer takes
_TEXT_TOKENS = 64  # beside the images', where nothing says how long a sample's text is
_PROMPT_TOKENS = 16  # of a class prompt or caption, where the model would take more


def activation_bytes(
    model: PlannedModel, config: Config, micro_batch_samples: int, num_classes: int | None
) -> tuple[int, str]:
    """Bytes that forward keeps for backward on one rank, and a line that says how that was estimated."""
    found, how = _kept(model, config, micro_batch_samples, num_classes)
    if config.training.gradient_checkpointing:
        # Each layer's input (2 of the formula's 34 bytes), and all of the one layer that is computed again.
        layers = max(1, sum(_layers(part) for part in _towers(_base_config(model))))
        found = found * _INPUT_BYTES // _FORMULA_BYTES + found // layers
        how += f"; gradient checkpointing: inputs of {layers} layers, and one layer"
    return found, how


def _kept(model: PlannedModel, config: Config, micro_batch_samples: int, num_classes: int | None) -> tuple[int, str]:
    if not config.model.generative:
        try:
            inputs = _inputs(model, config, micro_batch_samples, num_classes)
            return _traced(model.module, config, inputs), f"activations: traced, inputs {_shapes(inputs)}"
        except Exception as error:  # any operator of any model may need data
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            found, how = _formula(model, config, micro_batch_samples)
            return found, f"{how} (no trace: {reason})"
    return _formula(model, config, micro_batch_samples)


def _base_config(model: PlannedModel) -> Any:
    return getattr(model.module, "get_base_model", lambda: model.module)().config


def _part(config: Any, *names: str) -> Any:
    """The first sub-config of ``names`` that there is, or the config itself."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _image_size(config: Any, folder: Path) -> int:
    size = getattr(_part(config, "vision_config"), "image_size", None) or getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"{folder / 'config.json'} has no image_size")
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _inputs(
    model: PlannedModel, config: Config, samples: int, num_classes: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    base = _base_config(model)
    size = _image_size(base, model.folder)
    channels = int(getattr(_part(base, "vision_config"), "num_channels", 3))
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "pixel_values": ((samples, channels, size, size), torch.float32)
    }
    if config.model.task == "contrastive":
        texts = samples if config.data.target == "caption" or num_classes is None else num_classes
        longest = int(getattr(_part(base, "text_config"), "max_position_embeddings", _PROMPT_TOKENS))
        inputs["input_ids"] = ((texts, min(longest, _PROMPT_TOKENS)), torch.int64)
    return inputs


def _shapes(inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, (shape, _) in inputs.items())


def _traced(module: nn.Module, config: Config, inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    # Not public by its path, but what torch's own estimators (torch.distributed._tools) and torchtitan's run on: meta
    # tensors would do for shapes, but torch takes another attention kernel on them, one that keeps the whole matrix.
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    sharding = config.sharding
    autocast = sharding.mixed_precision == "bfloat16" and sharding.backend in ("single", "ddp")
    dtype = getattr(torch, config.model.dtype if autocast or sharding.mixed_precision == "none" else "bfloat16")
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> Any:
        of_dtype = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=of_dtype, device="meta")
        return FakeTensor(mode, empty, torch.device("cpu"))

    own: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        own[name] = fake(parameter).requires_grad_(parameter.requires_grad)
    for name, buffer in module.named_buffers():
        own[name] = fake(buffer)
    held = {_storage(tensor) for tensor in own.values()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # a storage's address is its own only while it lives

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in held:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    training = module.training
    module.train()
    try:
        with mode, saved_tensors_hooks(keep, lambda tensor: tensor):
            given = {
                name: torch.zeros(shape, dtype=dtype if kind.is_floating_point else kind)
                for name, (shape, kind) in inputs.items()
            }
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                outputs = torch.func.functional_call(module, own, kwargs=given)
            del outputs
    finally:
        module.train(training)
    return sum(saved.values())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _formula(model: PlannedModel, config: Config, samples: int) -> tuple[int, str]:
    base = _base_config(model)
    vision, text = getattr(base, "vision_config", None), _part(base, "text_config")
    width = compute_bytes(config)
    total, tokens = 0, _TEXT_TOKENS
    if vision is not None and getattr(vision, "image_size", None):
        patches = (_image_size(base, model.folder) // int(getattr(vision, "patch_size", 16))) ** 2
        total += _layers_bytes(vision, patches) * width // 2
        tokens += int(getattr(base, "image_seq_length", None) or getattr(base, "image_seq_len", None) or patches)
    tokens = config.data.max_tokens or tokens
    total += _layers_bytes(text, tokens) * width // 2
    total += tokens * int(getattr(text, "vocab_size", 0)) * (width + 4)  # logits, and their softmax in float32
    if total == 0:
        return (
            0,
            f"activations: not known and not counted: {model.folder / 'config.json'} tells no layers or hidden_size",
        )
    return samples * total, f"activations: by formula, {tokens} tokens a sample (data.max_tokens sets them)"


def _layers_bytes(config: Any, tokens: int) -> int:
    hidden = int(getattr(config, "hidden_size", 0) or getattr(config, "embed_dim", 0))
    return _FORMULA_BYTES * tokens * hidden * _layers(config)


def _layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0))


def _towers(config: Any) -> list[Any]:
    """The sub-configs that have layers, or the config itself."""
    found = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    return [part for part in found if part is not None] or [config]
