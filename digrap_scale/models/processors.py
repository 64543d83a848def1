"""A vision-language model's processor, for images and text alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from digrap_scale.errors import ConfigError

# Everything beside the weights that belongs to a model's folder, and that fine-tuning does not change.
_KEPT = ("*processor*.json", "*token*.json", "vocab.json", "*.txt", "*.model", "*.jinja", "chat_template.json",
         "generation_config.json")  # fmt: skip


def load_processor(folder: Path, model_config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """The processor of the folder's model: image processor, tokenizer and chat template.

    It is put together here and not by ``AutoProcessor``: that asks for a video processor wherever a family has one, and
    with it for torchvision, of which no image needs anything.

    Raises:
        ConfigError: the folder has none, or one that transformers cannot build; a model without a processor class.
    """
    if trust_remote_code and "AutoProcessor" in (getattr(model_config, "auto_map", None) or {}):
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    name = PROCESSOR_MAPPING_NAMES.get(model_config.model_type)
    if name is None:
        raise ConfigError(
            f"model.path: {folder}: transformers knows no processor for model_type {model_config.model_type!r}; "
            "model.task vqa needs one that takes images and text"
        )
    try:
        cls = _images_only(getattr(transformers, name))
        parts = {
            # PIL's resampling on every machine, whether torchvision is installed or not.
            "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"),
            "tokenizer": AutoTokenizer.from_pretrained(folder),
        }
        settings, _ = cls.get_processor_dict(folder, local_files_only=True)
        return cls.from_args_and_dict([parts.get(part) for part in cls.get_attributes()], settings)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        line = " ".join(str(error).split())[:400]
        raise ConfigError(f"model.path: {folder}: {name} cannot be loaded: {type(error).__name__}: {line}") from error


def _images_only(cls: Any) -> Any:
    """The processor class, content without its video and audio parts."""

    class ImagesOnly(cls):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    ImagesOnly.__name__ = cls.__name__
    return ImagesOnly


def copy_processor(source: Path, destination: Path) -> None:
    """Processor, tokenizer, chat template and generation config, as they are in the checkpoint."""
    for path in sorted({path for pattern in _KEPT for path in source.glob(pattern)}):
        shutil.copyfile(path, destination / path.name)
