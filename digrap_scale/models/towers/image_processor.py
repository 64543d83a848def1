"""The towers' image processor: one of transformers' own, so that ``AutoImageProcessor`` reads it back."""

from __future__ import annotations

from transformers import BaseImageProcessor, CLIPImageProcessor

# EfficientNet-Lite was trained on (pixel − 127) / 128, pixel in 0 … 255
MEAN = 127 / 255
STD = 128 / 255


def image_processor(image_size: int) -> BaseImageProcessor:
    """Resize to ``image_size`` × ``image_size`` (bicubic), scale to 0 … 1, normalise as EfficientNet-Lite expects.

    CLIP's class is taken for its configurable steps (it also converts to RGB); without torchvision transformers falls
    back to its Pillow implementation by itself, under the same name in ``preprocessor_config.json``.
    """
    side = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        do_convert_rgb=True,
    )
