"""Augmentation on PIL images, before the model's own processor."""

from __future__ import annotations

import math
import random

from PIL import Image

CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


def random_resized_crop(image: Image.Image, seed: int) -> Image.Image:
    """A random box of 50 … 100 % of the area, its sides' ratio 3:4 … 4:3, resized to a square of the shorter side.

    A box that is wider or higher than the image is cut to it, so a long image gives up more of its area.
    Source: Szegedy et al. 2014, arXiv 1409.4842 (with a gentler area for fine-tuning). Equal seeds give equal crops.
    """
    rng = random.Random(seed)
    width, height = image.size
    area = width * height * rng.uniform(*CROP_AREA)
    ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
    box_width = min(float(width), math.sqrt(area * ratio))
    box_height = min(float(height), math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    side = min(width, height)
    box = (left, top, left + box_width, top + box_height)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
