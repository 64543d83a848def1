"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837).

Files (visualqa.org, download): ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json`` (the
same for train2014), COCO's ``val2014/COCO_val2014_000000000042.jpg``. Shape: see ``vqa_json.py``; the split is the
questions' ``data_subtype``. OK-VQA (Marino et al. 2019, arXiv 1906.00067; okvqa.allenai.org) has the same shape in
``OpenEnded_mscoco_val2014_questions.json`` and ``mscoco_val2014_annotations.json``: five annotators, each answer listed
twice so that there are ten, stemmed in ``answer`` (which the official scores use) and as typed in ``raw_answer``; its
``question_type`` is a code whose meaning stands in the annotations' ``question_types``.
Tested on small files written to these formats, not on the benchmarks' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, coco_images, field, joined, vqa_item
from digrap_scale.errors import ConfigError

SPLITS = ("train2014", "val2014")


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of VQA v2 or OK-VQA."""
    questions = Table.read(sources.questions, "questions")
    split = questions.top.get("data_subtype")
    if split not in SPLITS:
        raise ConfigError(f"{questions.path}: data_subtype: expected one of {', '.join(SPLITS)}, found {split!r}")
    annotations = Table.read(sources.annotations, "annotations")
    names = annotations.top.get("question_types")

    def make(question: dict[str, Any], annotation: dict[str, Any], where: str) -> Item:
        item = vqa_item(question, annotation, where, coco_images(split, field(question, "image_id", int, where)))
        kind = item.meta.get("question_type")
        if isinstance(names, dict) and kind in names:
            item.meta["question_type"] = names[kind]
        return item

    yield from items(joined(questions, annotations), make)


BENCHMARK = Benchmark(("questions", "annotations"), read)
