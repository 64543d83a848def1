"""VQA-Rephrasings (Shah et al. 2019, arXiv 1902.05660): three human rephrasings each of 40,504 VQA v2 questions.

Files (facebookresearch.github.io/VQA-Rephrasings): ``v2_OpenEnded_mscoco_valrep2014_humans_og_questions.json`` and
``v2_mscoco_valrep2014_humans_og_annotations.json``, shaped as VQA v2 (see ``vqa_json.py``), images of COCO val2014. "og":
the original questions are in the files, too; a rephrasing has ``rephrasing_of``, the original's question id, and an id of
its own: ten times that plus 0 to 3. Such an id can also be that of another image's original (a question's id is a thousand
times its image's plus a count: 730000 is the first of image 730, and a rephrasing of image 73's first), so only question and
image together name a sample. Originals are left out (VQA v2's own validation set is the ID set), unless
``vqa-rephrasings-og`` is asked for: published figures are often over the whole file.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, coco_images, field, joined, vqa_item


def _read(sources: Sources, originals: bool) -> Iterator[Item | Problem]:
    questions = Table.read(sources.questions, "questions")
    annotations = Table.read(sources.annotations, "annotations")

    def make(question: dict[str, Any], annotation: dict[str, Any], where: str) -> Item:
        image = field(question, "image_id", int, where)
        key = f"{question['question_id']}-{image}"
        item = vqa_item(question, annotation, where, coco_images("val2014", image), key=key)
        item.meta["image_id"] = image
        if "rephrasing_of" in question:
            item.meta["rephrasing_of"] = question["rephrasing_of"]
        return item

    pairs = joined(questions, annotations, ids=("question_id", "image_id"))
    wanted = (one for one in pairs if isinstance(one, Problem) or originals or "rephrasing_of" in one[0])
    yield from items(wanted, make)


BENCHMARK = Benchmark(("questions", "annotations"), partial(_read, originals=False))
WITH_ORIGINALS = Benchmark(("questions", "annotations"), partial(_read, originals=True))
