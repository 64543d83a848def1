"""Small random models saved in Hugging Face layout, with real tokenizers and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from digrap_scale.config.schema import Config
from digrap_scale.models.towers import (
    DualEncoderConfig,
    DualEncoderModel,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    TextTable,
)

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "picture", "of", "red", "green", "blue", "thing"]
CLASSES = {"red": "a picture of red", "green": "a picture of green thing", "blue": "a blue thing"}
SMALL_STAGES = [[1, 3, 1, 1, 4], [2, 3, 2, 2, 8]]


def save_tokenizer(folder: Path, length: int = 8) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=length,
    ).save_pretrained(folder)


def text_settings() -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def vision_settings() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text_settings(), vision_config=vision_settings(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text_settings(), vision_config=vision_settings())).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_vit(folder: Path, classes: int = 3, **settings: Any) -> Path:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**vision_settings(), num_labels=classes, **settings)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_resnet(folder: Path, classes: int = 3) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=classes)
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_lite(folder: Path, classes: int = 3) -> Path:
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(stages=SMALL_STAGES, stem_channels=4, hidden_size=16, num_labels=classes)
    EfficientNetLiteForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_vit_mae(folder: Path, classes: int = 3) -> Path:
    """As the hub has them: pre-trained with a decoder, and no head (``classes`` is for the others' signature)."""
    torch.manual_seed(0)
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTMAEConfig(**vision_settings(), **{f"decoder_{name}": value for name, value in decoder.items()})
    ViTMAEForPreTraining(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_beit(folder: Path, classes: int = 3) -> Path:
    torch.manual_seed(0)
    config = BeitConfig(
        **vision_settings(), num_labels=classes, use_relative_position_bias=True, drop_path_rate=0.0, out_indices=[1]
    )
    BeitForImageClassification(config).save_pretrained(folder)
    BeitImageProcessorPil(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=False
    ).save_pretrained(folder)
    return folder


def save_dual_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = EfficientNetLiteConfig(stages=SMALL_STAGES, stem_channels=4, hidden_size=16)
    model = DualEncoderModel(DualEncoderConfig(vision_config=vision, projection_dim=8, num_texts=3))
    model.set_text_table(torch.nn.functional.normalize(torch.randn(3, 8), dim=-1))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    TextTable(CLASSES.values()).save_pretrained(folder)
    return folder


def make_config(
    path: Path | str, task: str, *, data: dict | None = None, optimizer: dict | None = None, **model: Any
) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": "unused"},
            "model": {"path": str(path), "task": task, **model},
            "data": {"train": ["unused.tar"], "classes": "unused.json", **(data or {})},
            "method": {"name": "none"},
            "optimizer": {"learning_rate": 1e-3, **(optimizer or {})},
            "training": {"steps": 1, "global_batch_samples": 4},
        }
    )
