"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions about text in Open Images.

Files (textvqa.org/dataset): ``TextVQA_0.5.1_val.json``: ``{"dataset_type": "val", "data": [{"question_id", "question",
"image_id", "answers": [ten texts], "image_classes", "question_tokens", "flickr_original_url", …}]}``; the images of
training and validation are both in ``train_images/{image_id}.jpg``. The test file has no ``answers``.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, field, vqa_item


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of one part of TextVQA."""

    def make(record: dict[str, Any], where: str) -> Item:
        name = f"{field(record, 'image_id', str, where)}.jpg"
        return vqa_item(record, record, where, (f"train_images/{name}", name))

    table = Table.read(sources.annotations, "data")
    yield from items(
        ((one, f"{table.path}: question_id {one.get('question_id')}") for one in table.records),
        make,
    )


BENCHMARK = Benchmark(("annotations",), read)
