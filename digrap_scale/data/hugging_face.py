"""Hugging Face datasets on disk as samples to be written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from digrap_scale.data.make import Item
from digrap_scale.data.reading import IMAGE_COUNT
from digrap_scale.data.tar import SampleError
from digrap_scale.errors import ConfigError


def list_hugging_face(folder: Path, image_columns: Sequence[str]) -> tuple[list[Item], list[str]]:
    """A dataset that ``datasets``' ``save_to_disk`` wrote: a sample a row; columns that JSON can hold become its JSON.

    Class labels are written by name, under their column's. Images are not read yet: what is wrong with them shows when
    they are written.

    Args:
        folder: of the dataset, or of one of its splits.
        image_columns: of an image or a list of images each; a sample's images are theirs, in this order.

    Raises:
        ConfigError: ``datasets`` is not installed; no such dataset, split or column; another column of images.
    """
    _opened.cache_clear()  # it may have been saved anew since
    data = _opened(str(folder))
    features = data.features
    for column in image_columns:
        if column not in features or not _holds_images(features[column]):
            raise ConfigError(f"{folder}: expected a column of images, found {column!r} in {', '.join(features)}")
    more = [name for name, feature in features.items() if _holds_images(feature) and name not in image_columns]
    if more:
        raise ConfigError(
            f"{folder}: column {more[0]!r} holds images, too: give --image-column {' '.join([*image_columns, *more])} "
            f"to take all of a row's, or remove it: dataset.remove_columns({more[0]!r}).save_to_disk(…)"
        )
    if IMAGE_COUNT in features:
        raise ConfigError(
            f"{folder}: column {IMAGE_COUNT!r}: a sample's JSON has the number of its images there; rename it"
        )
    # A row's images have no time of their own: that of the files tells whether a killed run's shards are still right.
    stamps = tuple(Path(file["filename"]).stat().st_mtime_ns for file in data.cache_files)
    items, problems = [], []
    for row, values in enumerate(data.remove_columns(list(image_columns))):
        try:
            meta = {name: _plain(features[name], value) for name, value in values.items()}
            json.dumps(meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            problems.append(f"{folder}: row {row}: {error}")
            continue
        read = partial(read_row, str(folder), tuple(image_columns), row)
        items.append(Item(f"{row:09d}", meta, read, stamps=stamps))
    return items, problems


def _holds_images(feature: Any) -> bool:
    """An Image, or a list of such, as any version of ``datasets`` has it."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return type(inner).__name__ == "Image"


def _plain(feature: Any, value: Any) -> Any:
    return feature.int2str(value) if type(feature).__name__ == "ClassLabel" and value is not None else value


@lru_cache(maxsize=4)
def _opened(folder: str) -> Any:
    """The dataset; opened once a process."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face datasets need a package: pip install datasets") from error
    try:
        data = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no dataset of save_to_disk ({error})") from error
    if isinstance(data, datasets.DatasetDict):
        raise ConfigError(f"{folder}: holds several splits; give the folder of one: {', '.join(data)}")
    return data.with_format(None)  # values as they are, whatever it was saved with


def read_row(folder: str, columns: Sequence[str], row: int) -> list[tuple[str, bytes]]:
    """The images of a row, as they are stored.

    Raises:
        SampleError: there is none.
        ValueError: of another format.
        OSError: a file that the row names cannot be read.
    """
    stored = _opened(folder).with_format("arrow")[row]
    found = []
    for column in columns:
        value = stored[column].to_pylist()[0]
        for image in value if isinstance(value, list) else [value]:
            if image is None or (image["bytes"] is None and not image["path"]):
                raise SampleError(f"row {row}: column {column!r} has no image")
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            found.append((_extension(content), content))
    return found


def _extension(content: bytes) -> str:
    for start, extension in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png")):
        if content.startswith(start):
            return extension
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise ValueError("the image is neither JPEG, PNG nor WebP")
