"""VQA-CP v2 (Agrawal et al. 2018, arXiv 1712.00377): VQA v2 split anew, so that answers' priors differ from training's.

Files (computing.ece.vt.edu/~aish/vqacp): ``vqacp_v2_test_questions.json`` and ``vqacp_v2_test_annotations.json``: each a bare
list of VQA v2's records, with one field more, ``coco_split`` (``train2014`` or ``val2014``): the test set has images of
both, ``COCO_{coco_split}_000000000042.jpg``.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, coco_images, field, joined, vqa_item
from digrap_scale.data.benchmarks.vqav2 import SPLITS
from digrap_scale.errors import ConfigError


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of one part of VQA-CP v2."""
    questions, annotations = Table.read(sources.questions, None), Table.read(sources.annotations, None)

    def make(question: dict[str, Any], annotation: dict[str, Any], where: str) -> Item:
        split = field(question, "coco_split", str, where)
        if split not in SPLITS:
            raise ConfigError(f"{where}: coco_split: expected one of {', '.join(SPLITS)}, found {split!r}")
        return vqa_item(question, annotation, where, coco_images(split, field(question, "image_id", int, where)))

    yield from items(joined(questions, annotations), make)


BENCHMARK = Benchmark(("questions", "annotations"), read)
