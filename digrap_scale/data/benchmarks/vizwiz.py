"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): pictures that blind people took, and their questions.

Files (vizwiz.org/tasks-and-datasets/vqa): ``Annotations/val.json``, a bare list of ``{"image": "VizWiz_val_00000000.jpg",
"question", "answers": [ten of {"answer", "answer_confidence"}], "answer_type", "answerable"}``; images in ``val/``. There is
no question id: the image's name without its ending serves, as there is one question an image. "unanswerable" and
"unsuitable" are answers as others. The test file has no ``answers``.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, field, vqa_item


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of one part of VizWiz."""
    assert sources.annotations is not None
    part = sources.annotations.stem

    def make(record: dict[str, Any], where: str) -> Item:
        name = field(record, "image", str, where)
        asked = {**record, "question_id": PurePosixPath(name).stem}
        item = vqa_item(asked, record, where, (f"{part}/{name}", name))
        if isinstance(record.get("answerable"), int):
            item.meta["answerable"] = record["answerable"]
        return item

    table = Table.read(sources.annotations, None)
    yield from items(((one, f"{table.path}: image {one.get('image')!r}") for one in table.records), make)


BENCHMARK = Benchmark(("annotations",), read)
