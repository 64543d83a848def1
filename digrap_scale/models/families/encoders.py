"""Image encoders whose checkpoints are of another class than the classifier that is built on them."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig, ViTConfig

__all__ = ["CLASSIFIER_CONFIGS", "classifier_config"]


def _vit_of_mae(config: PreTrainedConfig) -> PreTrainedConfig:
    """A ViT-MAE's encoder (He et al. 2021, arXiv 2111.06377) is a ViT: names and shapes of its weights are the same. The
    decoder, which only pre-training needs, and the masking stay behind."""
    known = set(ViTConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    settings = {name: value for name, value in config.to_dict().items() if name in known}
    return ViTConfig(**settings)


# model_type of a checkpoint → the config of the classifier that its weights fit.
CLASSIFIER_CONFIGS: dict[str, Callable[[PreTrainedConfig], PreTrainedConfig]] = {"vit_mae": _vit_of_mae}


def classifier_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that ``AutoModelForImageClassification`` knows; most checkpoints' own."""
    convert = CLASSIFIER_CONFIGS.get(config.model_type)
    return config if convert is None else convert(config)
