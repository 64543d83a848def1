"""AdVQA (Sheng et al. 2021, arXiv 2106.02280): questions that people wrote until a VQA model failed.

Files (adversarialvqa.org, download): ``v1_OpenEnded_mscoco_val2017_advqa_questions.json`` and
``v1_mscoco_val2017_advqa_annotations.json``, shaped as VQA v2 (see ``vqa_json.py``). The images are COCO val2017, a part of
COCO val2014: ``val2017/000000000042.jpg`` or ``val2014/COCO_val2014_000000000042.jpg``, whichever is there. The test-dev
questions (``…testdev2015…``) have no public answers.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, coco_images, field, joined, vqa_item


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of AdVQA, validation."""
    questions = Table.read(sources.questions, "questions")
    annotations = Table.read(sources.annotations, "annotations")

    def make(question: dict[str, Any], annotation: dict[str, Any], where: str) -> Item:
        image = field(question, "image_id", int, where)
        name = f"{image:012d}.jpg"
        return vqa_item(question, annotation, where, (f"val2017/{name}", name, *coco_images("val2014", image)))

    yield from items(joined(questions, annotations), make)


BENCHMARK = Benchmark(("questions", "annotations"), read)
