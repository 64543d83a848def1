"""IV-VQA and CV-VQA (Agarwal et al. 2020, arXiv 1912.07538): VQA v2 questions about images from which an object is removed.

Files (github.com/AgarwalVedika/CausalVQA): ``v2_OpenEnded_mscoco_val2014_questions.json`` with ``questions`` and
``v2_mscoco_val2014_annotations.json`` with ``annotations``, one pair a set. By its ``cv_vqa_gen_qa.py`` and
``my_snippets.py``: ``image_id`` of an edited image is the text ``000000262284_000000000044`` (COCO's image id, then the
removed category (IV) or instance (CV), twelve digits each), its file ``COCO_val2014_{image_id}.jpg``; one question asked
about several edits keeps its ``question_id``, so that only both ids together name a sample; there is no
``data_subtype``. CV-VQA counts one less in ``answers``, while ``multiple_choice_answer`` keeps the old count (not read
here). A whole number as ``image_id`` is an unedited COCO image.
Tested on small files written to this format, not on the benchmarks' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, coco_images, field, joined, vqa_item
from digrap_scale.errors import ConfigError

SPLIT = "val2014"
_EDITED = re.compile(r"[0-9]{12}_[0-9]{12}")


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of IV-VQA or CV-VQA, validation."""
    questions = Table.read(sources.questions, "questions")
    annotations = Table.read(sources.annotations, "annotations")

    def make(question: dict[str, Any], annotation: dict[str, Any], where: str) -> Item:
        image = field(question, "image_id", (int, str), where)
        if isinstance(image, int):
            images = coco_images(SPLIT, image)
        elif _EDITED.fullmatch(image):
            name = f"COCO_{SPLIT}_{image}.jpg"
            images = (f"{SPLIT}/{name}", name)
        else:
            raise ConfigError(f"{where}: image_id: expected 12 digits, _, 12 digits or a whole number, found {image!r}")
        item = vqa_item(question, annotation, where, images, key=f"{question['question_id']}-{image}")
        item.meta["image_id"] = image
        return item

    yield from items(joined(questions, annotations, ids=("question_id", "image_id")), make)


BENCHMARK = Benchmark(("questions", "annotations"), read)
