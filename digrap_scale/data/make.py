"""Shards from what people have: image folders, LLaVA's JSON, Hugging Face datasets on disk.

A source is listed first, with every problem at once. The list is cut into shards by count and bytes, and each shard is
written by one of several processes, in a hidden folder beside, under its own name only when it is whole. A run that is
killed goes on with the shards that are missing, as long as source and limits are the same; when all are there they are
counted, summed and moved into place, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds

from digrap_scale.data.manifest import Manifest, index_shards, replacing
from digrap_scale.data.shards import FIXED_MEMBER_FIELDS, check_key, publish_shards
from digrap_scale.data.tar import IMAGE_EXTENSIONS
from digrap_scale.errors import ConfigError, SaveError

PLAN_FILE = "plan.json"
TAR_OVERHEAD_BYTES = 3 * 512  # of a sample's JSON: two headers, and padding
MAX_SHOWN_PROBLEMS = 50

Images = Callable[[], list[tuple[str, bytes]]]


@dataclass(frozen=True)
class Item:
    """A sample to be written.

    Attributes:
        key: unique.
        meta: the JSON's content.
        images: gives (extension, encoded image) of each, in the writing process.
        size_bytes: of the images together.
    """

    key: str
    meta: dict[str, Any]
    images: Images
    size_bytes: int


def read_images(paths: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Extension and content of image files."""
    return [(path.suffix[1:].lower(), path.read_bytes()) for path in paths]


def list_folder(folder: Path) -> tuple[list[Item], list[str]]:
    """Images below ``folder``: ``label`` is the first folder's name, ``caption`` a text file's beside the image.

    Returns:
        Items in the order of their names, and problems.
    """
    items, problems = [], []
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of images")
    for path in sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in IMAGE_EXTENSIONS):
        name = path.relative_to(folder)
        meta: dict[str, Any] = {"label": name.parts[0]} if len(name.parts) > 1 else {}
        caption = path.with_suffix(".txt")
        if caption.is_file():
            meta["caption"] = caption.read_text(encoding="utf-8").strip()
        if meta:
            key = _as_key(str(name.with_suffix("")))
            items.append(Item(key, meta, partial(read_images, [path]), path.stat().st_size))
        else:
            problems.append(f"{path}: lies in no folder that could be its label, and has no {caption.name} beside it")
    return items, problems


def class_names(items: Sequence[Item]) -> list[str]:
    """The labels of all items, each once, sorted: what ``data.classes`` is to list.

    Raises:
        ConfigError: an item has no label that is a text.
    """
    labels = [item.meta.get("label") for item in items]
    for item, label in zip(items, labels, strict=True):
        if not isinstance(label, str):
            raise ConfigError(
                f"--classes-out: sample {item.key} has no `label` that is a text, found {label!r}; leave it out"
            )
    return sorted({str(label) for label in labels})


def list_llava(file: Path, images: Path) -> tuple[list[Item], list[str]]:
    """LLaVA's records ({id, image, conversations}; a JSON list or a JSON a line): a sample for each question and answer.

    A sample has ``question`` (without ``<image>``), ``answers`` (one) and ``id``; earlier turns are not repeated in it.
    Chats as other tools keep them are read, too: ``images`` and ``messages``, ``role`` (user, assistant) and ``content``,
    a text or a list of ``{"type": "text", "text": …}`` and ``{"type": "image", "path": …}``.
    Source: Liu et al. 2023, arXiv 2304.08485, and its repository's data format.

    Args:
        file: the records.
        images: what their images' paths start from.
    """
    items, problems = [], []
    for number, record in enumerate(_records(file)):
        where = f"{file}: record {number}"
        try:
            turns = [_turn(turn) for turn in record["conversations" if "conversations" in record else "messages"]]
            paths = record.get("image") or record.get("images") or [path for _, _, shown in turns for path in shown]
            paths = [images / path for path in ([paths] if isinstance(paths, str) else paths)]
            wrong = [p for p in paths if p.suffix[1:].lower() not in IMAGE_EXTENSIONS or not p.is_file()]
            if wrong:
                raise ValueError(f"image {wrong[0]} is missing, or none of {', '.join(IMAGE_EXTENSIONS)}")
            name = str(record.get("id", number))
            size = sum(path.stat().st_size for path in paths)
            for turn in range(0, len(turns), 2):
                (asks, question, _), (answers, answer, _) = turns[turn], turns[turn + 1]
                if asks not in ("human", "user") or answers not in ("gpt", "assistant"):
                    raise ValueError(
                        f"turn {turn}: expected human, then gpt (or user, then assistant), found {asks}, {answers}"
                    )
                meta = {"id": name, "question": _text(question), "answers": [answer.strip()]}
                key = _as_key(name if len(turns) == 2 else f"{name}-{turn // 2}")
                items.append(Item(key, meta, partial(read_images, paths), size))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: {type(error).__name__}: {error}")
    return items, problems


def list_hugging_face(folder: Path, image_column: str) -> tuple[list[Item], list[str]]:
    """A dataset that ``datasets``' ``save_to_disk`` wrote: a sample a row; columns that JSON can hold become its JSON.

    Class labels are written by name, under their column's.

    Raises:
        ConfigError: ``datasets`` is not installed; no such dataset, split or column.
    """
    data = open_hugging_face(str(folder))
    features = data.features
    if image_column not in features or type(features[image_column]).__name__ != "Image":
        raise ConfigError(f"{folder}: expected a column of images, found {image_column!r} in {', '.join(features)}")
    texts = data.remove_columns([image_column])
    items, problems = [], []
    for row, values in enumerate(texts):
        meta = {
            name: features[name].int2str(value) if type(features[name]).__name__ == "ClassLabel" else value
            for name, value in values.items()
        }
        try:
            json.dumps(meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            problems.append(f"{folder}: row {row}: {error}")
            continue
        items.append(Item(f"{row:09d}", meta, partial(read_row, str(folder), image_column, row), 0))
    return items, problems


_opened: dict[str, Any] = {}


def open_hugging_face(folder: str) -> Any:
    """The dataset, its images as they are stored; once a process."""
    if folder not in _opened:
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
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        _opened[folder] = data
    return _opened[folder]


def read_row(folder: str, column: str, row: int) -> list[tuple[str, bytes]]:
    """The image of a row, as it is stored."""
    stored = open_hugging_face(folder)[row][column]
    content = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
    return [(_extension(content), content)]


def _extension(content: bytes) -> str:
    for start, extension in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png")):
        if content.startswith(start):
            return extension
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise ValueError("the image is neither JPEG, PNG nor WebP")


def make_shards(
    items: Sequence[Item],
    folder: Path,
    *,
    prefix: str,
    samples_per_shard: int,
    shard_bytes: int | None = None,
    processes: int = 1,
) -> Manifest:
    """Writes ``PREFIX-000000.tar`` … and their manifest; goes on where an earlier, killed run stopped.

    Args:
        items: unique keys, in order.
        folder: where to; made if it is missing. An earlier set of the same prefix is replaced at the end.
        prefix: of the files' names.
        samples_per_shard: at most.
        shard_bytes: at most, as far as the images' sizes are known before; None: as the count has it.
        processes: shards written at a time.

    Raises:
        ConfigError: no items, a bad or repeated key, an image that cannot be read.
        SaveError: the disk refuses.
    """
    problems = [problem for item in items if (problem := check_key(item.key)) is not None]
    problems += [f"key {key!r} comes {n} times" for key, n in Counter(i.key for i in items).items() if n > 1]
    if not items:
        problems.append(f"no samples for shards {prefix}-*.tar")
    if problems:
        more = len(problems) - MAX_SHOWN_PROBLEMS
        raise ConfigError(problems[:MAX_SHOWN_PROBLEMS] + ([f"… and {more} more problems"] if more > 0 else []))
    shards = list(_cut(items, samples_per_shard, shard_bytes))
    making = folder / f".{prefix}.making"
    try:
        _begin(making, _digest(shards))
        paths = [making / f"{prefix}-{number:06d}.tar" for number in range(len(shards))]
        left = [(path, shard) for path, shard in zip(paths, shards, strict=True) if not path.exists()]
        if processes > 1:
            with ProcessPoolExecutor(processes) as pool:
                list(pool.map(_write_shard, *zip(*left, strict=True))) if left else None
        else:
            for path, shard in left:
                _write_shard(path, shard)
        manifest, _ = index_shards(paths, prefix, processes=processes)
        publish_shards(manifest, making, folder, prefix)
        shutil.rmtree(making)
    except OSError as error:
        raise SaveError(f"{folder}: shards {prefix}-*.tar could not be written: {error}") from error
    return manifest


def _begin(making: Path, digest: str) -> None:
    """Keeps the shards of a killed run if they are of the same plan."""
    plan = making / PLAN_FILE
    if not (plan.is_file() and plan.read_text() == digest):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        plan.write_text(digest)


def _digest(shards: Sequence[Sequence[Item]]) -> str:
    """Tells plans apart: keys, JSON and sizes of every shard."""
    digest = hashlib.sha256()
    for shard in shards:
        for item in shard:
            digest.update(json.dumps([item.key, item.meta, item.size_bytes], sort_keys=True).encode())
        digest.update(b"|")
    return digest.hexdigest()


def _cut(items: Iterable[Item], samples_per_shard: int, shard_bytes: int | None) -> Iterator[list[Item]]:
    shard: list[Item] = []
    size = 0
    for item in items:
        own = item.size_bytes + len(json.dumps(item.meta)) + TAR_OVERHEAD_BYTES
        if shard and (len(shard) >= samples_per_shard or (shard_bytes is not None and size + own > shard_bytes)):
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += own
    if shard:
        yield shard


def _write_shard(path: Path, items: Sequence[Item]) -> None:
    with replacing(path) as stream:
        writer = wds.TarWriter(stream, **FIXED_MEMBER_FIELDS)
        for item in items:
            try:
                images = item.images()
            except (OSError, ValueError) as error:
                raise ConfigError(f"sample {item.key}: its image cannot be read: {error}") from error
            names = [f"{i}.{extension}" if len(images) > 1 else extension for i, (extension, _) in enumerate(images)]
            members = {name: content for name, (_, content) in zip(names, images, strict=True)}
            text = json.dumps(item.meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
            writer.write({"__key__": item.key, **members, "json": text.encode()})
        writer.close()


def _records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: expected a JSON list, or a JSON object a line ({error})") from error


def _turn(turn: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Who speaks, the text, and paths of images that stand in it."""
    speaker, content = turn["from" if "from" in turn else "role"], turn["value" if "value" in turn else "content"]
    if isinstance(content, str):
        return speaker, content, []
    texts = [part["text"] for part in content if part["type"] == "text"]
    paths = [part["path"] for part in content if part["type"] == "image" and "path" in part]
    return speaker, "\n".join(texts), paths


def _text(value: str) -> str:
    return value.replace("<image>", "").strip()


def _as_key(name: str) -> str:
    """A name as a key: dots, which would begin the extension, and what file systems may not take, become ``_``."""
    return re.sub(r"[.\\\x00-\x1f]", "_", name.strip().strip("/"))
