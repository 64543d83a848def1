"""Small towers that transformers lacks, registered with its Auto classes when this package is imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from digrap_scale.models.towers.dual_encoder import DualEncoderConfig, DualEncoderModel, DualEncoderOutput
from digrap_scale.models.towers.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    EfficientNetLiteModel,
)
from digrap_scale.models.towers.text_table import TextTable
from digrap_scale.models.towers.token_tower import EfficientNetLiteTokensConfig, EfficientNetLiteTokensModel

__all__ = [
    "DualEncoderConfig",
    "DualEncoderModel",
    "DualEncoderOutput",
    "EfficientNetLiteConfig",
    "EfficientNetLiteForImageClassification",
    "EfficientNetLiteModel",
    "EfficientNetLiteTokensConfig",
    "EfficientNetLiteTokensModel",
    "TextTable",
    "register",
]


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForImageClassification`` know the towers (safe to repeat)."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoConfig.register(EfficientNetLiteTokensConfig.model_type, EfficientNetLiteTokensConfig, exist_ok=True)
    AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
    AutoModel.register(EfficientNetLiteTokensConfig, EfficientNetLiteTokensModel, exist_ok=True)
    AutoModel.register(DualEncoderConfig, DualEncoderModel, exist_ok=True)
    AutoModelForImageClassification.register(
        EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True
    )


register()
