"""The study's classification sets put as questions: each drawing in one cell of a page, and what kind of thing it is.

    python benchmarks/robustness/make_questions.py --sets runs/robustness/sets --out runs/robustness/questions

The same drawings, classes and splits as in ``pictograms.yaml`` (``make_sets.py`` makes the shifted ones first), asked in
Pictogram-VQA's own words for a kind of thing, so that the small generative VLM answers with a class's noun. Cells are taken
in turn. Everything follows from the sets: equal sets give equal bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from digrap_scale.data.shards import write_shards
from digrap_scale.demo import scenes
from digrap_scale.demo.pictogram_vqa import read_set
from digrap_scale.demo.settings import ASSETS

PICTOGRAMS = ASSETS / "pictograms"
SAMPLES_PER_SHARD = 10_000
FORM = "category"


def asked(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Every drawing of a set, as a question about a page (RGB, two tiles wide and high)."""
    for number, sample in enumerate(read_set(folder, name)):
        index = number % len(scenes.CELLS)
        noun = scenes.NOUNS[sample["meta"]["label"]]
        question = scenes.Question(FORM, FORM, "", scenes.CELLS[index], noun)
        page = Image.new("RGB", (2 * scenes.TILE, 2 * scenes.TILE), "white")
        drawn = sample["image"].convert("RGB").resize((scenes.TILE, scenes.TILE), Image.Resampling.BICUBIC)
        page.paste(drawn, (index % 2 * scenes.TILE, index // 2 * scenes.TILE))
        yield {
            "key": f"{name}-{number:05d}",
            "image": scenes.encode(page),
            "extension": "webp",
            "meta": {
                "question": scenes.word(question, scenes.WORDINGS["standard"][FORM][0]),
                "answers": [noun],
                "question_type": FORM,
                "concept": sample["meta"]["concept"],
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=Path, required=True, help="what make_sets.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for folder in (PICTOGRAMS, options.sets):
        for manifest in sorted(folder.glob("*.manifest.json")):
            name = manifest.name.removesuffix(".manifest.json")
            shards = write_shards(asked(folder, name), options.out, prefix=name, samples_per_shard=SAMPLES_PER_SHARD)
            print(name, shards.samples)


if __name__ == "__main__":
    main()
