"""COCO captions (Chen et al. 2015, arXiv 1504.00325): five captions, mostly, of each image.

Files (cocodataset.org, download): ``captions_val2017.json`` (also train2017, val2014, train2014): ``{"info", "licenses",
"images": [{"id", "file_name": "000000397133.jpg", "height", "width", …}], "annotations": [{"id", "image_id", "caption"}]}``;
images in ``val2017/``. The captions of an image stand anywhere in the list. A sample is an image: ``caption`` is its first in the
file's order, ``captions`` all of them, without the spaces and line ends around them that some have.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.data.benchmarks.vqa_json import Table, field
from digrap_scale.errors import ConfigError


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of one part of COCO captions."""
    images, annotations = Table.read(sources.annotations, "images"), Table.read(sources.annotations, "annotations")
    path = images.path
    part = path.stem.removeprefix("captions_")
    of_image: dict[int, list[dict[str, Any]]] = {}
    for number, record in enumerate(images.records):
        identity = field(record, "id", int, f"{path}: images: record {number}")
        if identity in of_image:
            raise ConfigError(f"{path}: images: id {identity} comes twice")
        of_image[identity] = []
    strangers = []
    for number, record in enumerate(annotations.records):
        identity = field(record, "image_id", int, f"{path}: annotations: record {number}")
        if identity in of_image:
            of_image[identity].append(record)
        else:
            strangers.append(f"{path}: annotation {record.get('id')}: image_id {identity} is not among the images")

    def make(record: dict[str, Any], where: str) -> Item:
        told = of_image[record["id"]]
        captions = [field(one, "caption", str, f"{path}: annotation {one.get('id')}").strip() for one in told]
        if not captions or not all(captions):
            raise ConfigError(f"{where}: expected captions, found {captions}")
        name = field(record, "file_name", str, where)
        meta = {"caption": captions[0], "captions": captions, "image_id": record["id"]}
        return Item(str(record["id"]), (f"{part}/{name}", name), meta, where)

    yield from items(((record, f"{path}: image {record['id']}") for record in images.records), make)
    yield from (Problem("unknown id", line) for line in strangers)


BENCHMARK = Benchmark(("annotations",), read)
