"""How a model computes its forward and backward: the attention kernel, and what is computed again instead of kept."""

from __future__ import annotations

from transformers import PreTrainedModel

from digrap_scale.config import Config
from digrap_scale.errors import ConfigError


def set_forward(model: PreTrainedModel, config: Config) -> None:
    """Apply ``model.attention`` and ``training.gradient_checkpointing``; weights are as they were.

    Raises:
        ConfigError: the model has no such attention, its package is missing, or the model cannot compute its layers again.
    """
    attention = config.model.attention
    if attention != "auto":
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"model.attention: {attention} cannot be had: {' '.join(str(error).split())[:300]}"
            ) from error
        if model.config._attn_implementation != attention:  # transformers has no public name for what was chosen
            raise ConfigError(
                f"model.attention: {type(model).__name__} stays with {model.config._attn_implementation}, expected {attention}; "
                "set auto"
            )
    if config.training.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"training.gradient_checkpointing: {type(model).__name__} cannot compute its layers again; set false, and a "
                "smaller training.micro_batch_samples"
            )
        # Not the reentrant form: it takes no gradient of a layer whose input has none (frozen embeddings, LoRA).
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
