"""The study's shifted test sets, from the pictograms that ship.

    pip install corrupt-tta==0.1.7 resvg-py==0.5.0
    python benchmarks/robustness/make_sets.py --out runs/robustness/sets [--no-fetch]

Near: of each source style's ID test set, ImageNet-C's corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261) at
severities 1, 3 and 5, drawn smaller, and on coloured grounds. Far: photographs (tuxpaint's stamps: fetched by apt-get, never
kept here); other styles ship already. Two source styles that pre-training has not seen are rendered from their npm packages
(openmoji is share-alike, so never kept here; of the other one only the test set ships). Each image of a corrupted set has one
of the corruptions, in turn. Everything follows from the names and numbers here: the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import make_pictograms
import pictograms as pg
from pictogram_vqa_far import photographs as fetch_photographs

from digrap_scale.data.shards import write_shards
from digrap_scale.demo.pictogram_vqa import read_set
from digrap_scale.demo.settings import ASSETS

PICTOGRAMS = ASSETS / "pictograms"
SOURCES = ("fluent-emoji-high-contrast", "noto", "twemoji")
FETCHED_SOURCES = ("emojione-monotone", "openmoji")
# Two of each of ImageNet-C's kinds (noise, blur, weather, digital) that need no large image.
CORRUPTIONS = (
    "gaussian_noise",
    "impulse_noise",
    "defocus_blur",
    "motion_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 3, 5)
IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)  # shares of the pixels, by severity: ImageNet-C's
SMALL = 0.55  # of the page's width
GROUNDS = ((255, 224, 178), (200, 230, 201), (187, 222, 251), (225, 190, 231), (255, 205, 210), (207, 216, 220))
SAMPLES_PER_SHARD = 10_000

Change = Callable[[Image.Image, int], Image.Image]


def corrupted(severity: int) -> Change:
    import corrupt_tta
    from skimage.util import random_noise  # comes with it

    def change(image: Image.Image, number: int) -> Image.Image:
        seed, name = 1000 * severity + number, CORRUPTIONS[number % len(CORRUPTIONS)]
        if name == "impulse_noise":  # the package's draws from a generator that nobody can seed
            noisy = random_noise(np.asarray(image) / 255.0, mode="s&p", amount=IMPULSES[severity - 1], rng=seed)
            return Image.fromarray((255 * np.clip(noisy, 0, 1)).astype(np.uint8))
        np.random.seed(seed)  # the others draw from numpy's global one
        found = corrupt_tta.corrupt(np.asarray(image), severity=severity, corruption_name=name)
        return Image.fromarray(np.clip(found, 0, 255).astype(np.uint8))

    return change


def smaller(image: Image.Image, number: int) -> Image.Image:
    page = Image.new("RGB", image.size, "white")
    side = round(image.width * SMALL)
    drawn = image.resize((side, side), Image.Resampling.LANCZOS)
    room = image.width - side
    page.paste(drawn, (room * (number % 3) // 2, room * (number // 3 % 3) // 2))
    return page


def on_a_ground(image: Image.Image, number: int) -> Image.Image:
    """White becomes the ground's colour, and every other colour is seen through it."""
    return ImageChops.multiply(image, Image.new("RGB", image.size, GROUNDS[number % len(GROUNDS)]))


def changed(folder: Path, style: str, name: str, change: Change) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(read_set(folder, f"{style}-test")):
        yield packed(f"{name}-{number:05d}", change(sample["image"], number), sample["meta"])


def packed(key: str, image: Image.Image, meta: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, "webp", lossless=True)
    return {"key": key, "image": stream.getvalue(), "extension": "webp", "meta": meta}


def rendered(style: str, part: str, packages: Path) -> Iterator[dict[str, Any]]:
    """The labelled concepts of a part ("train" or "test") as the style draws them, with the shipped sets' split and quality."""
    icons = pg.read_icons(pg.fetch((pg.STYLES | pg.FETCHED_STYLES)[style], packages))
    yield from make_pictograms.demo_samples(icons, pg.make_split(), style, part)


def photographs(packages: Path) -> Iterator[dict[str, Any]]:
    tiles, label = fetch_photographs(packages)
    for number, concept in enumerate(sorted(tiles)):
        image = tiles[concept].resize((64, 64), Image.Resampling.LANCZOS)
        yield packed(f"photos-{number:05d}", image, {"label": label[concept], "concept": concept})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where packages are kept")
    parser.add_argument("--no-fetch", action="store_true", help="only what can be made of the sets that ship")
    options = parser.parse_args()

    def write(prefix: str, samples: Iterator[dict[str, Any]]) -> None:
        print(prefix, write_shards(samples, options.out, prefix=prefix, samples_per_shard=SAMPLES_PER_SHARD).samples)

    test_sets = dict.fromkeys(SOURCES, PICTOGRAMS)
    if not options.no_fetch:
        for style in FETCHED_SOURCES:
            for part in ("train", "test"):
                write(f"{style}-{part}", rendered(style, part, options.packages))
            test_sets[style] = options.out
        write("photos", photographs(options.packages))
    changes = {f"corrupted-{severity}": corrupted(severity) for severity in SEVERITIES}
    for style, folder in test_sets.items():
        for name, change in {**changes, "small": smaller, "grounds": on_a_ground}.items():
            write(f"{style}-{name}", changed(folder, style, f"{style}-{name}", change))


if __name__ == "__main__":
    main()
