"""What people have, as samples to be written: image folders, LLaVA's JSON and chats of other tools.

Everything is listed before anything is written, with every problem at once; each problem is one sample's and can be left out.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from digrap_scale.data.make import Item
from digrap_scale.data.shards import check_key
from digrap_scale.data.tar import IMAGE_EXTENSIONS
from digrap_scale.errors import ConfigError

# Images that shards do not hold: left out without a word, a class could vanish.
_OTHER_IMAGES = frozenset(
    ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "pbm", "pgm", "ppm", "tga", "tif", "tiff")
)
_PAIR = "expected human, then gpt (or user, then assistant)"


def read_images(paths: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Extension and content of image files."""
    return [(path.suffix[1:].lower(), path.read_bytes()) for path in paths]


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a path that starts from a folder stays in it, as it is written."""
    return ".." not in PurePosixPath(name).parts and (folder / name).is_relative_to(folder)


def _file_item(key: str, meta: dict[str, Any], paths: Sequence[Path]) -> Item:
    """A sample of image files. Raises: ValueError: the key is none, or a file is not there."""
    if (problem := check_key(key)) is not None:
        raise ValueError(problem)
    states = []
    for path in paths:
        try:
            states.append(path.stat())
        except OSError as error:
            raise ValueError(f"image {path} is missing, or cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(states[-1].st_mode):
            raise ValueError(f"image {path} is no file")
    sizes, times = tuple(state.st_size for state in states), tuple(state.st_mtime_ns for state in states)
    return Item(key, meta, partial(read_images, paths), sizes, times)


def list_folder(folder: Path) -> tuple[list[Item], list[str]]:
    """Images below ``folder``: ``label`` is the first folder's name, ``caption`` a text file's beside the image.

    Returns:
        Items in the order of their names, and problems.

    Raises:
        ConfigError: there is no such folder.
    """
    items, problems = [], []
    of_key: dict[str, Path] = {}
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of images")
    for path in sorted(folder.rglob("*")):
        extension = path.suffix[1:].lower()
        if extension in _OTHER_IMAGES:
            problems.append(f"{path}: expected an image in {', '.join(IMAGE_EXTENSIONS)}; convert it first")
        if extension not in IMAGE_EXTENSIONS:
            continue
        name = path.relative_to(folder)
        meta: dict[str, Any] = {"label": name.parts[0]} if len(name.parts) > 1 else {}
        caption = path.with_suffix(".txt")
        try:
            if caption.is_file():
                meta["caption"] = _caption(caption)
            if not meta:
                raise ValueError(f"lies in no folder that could be its label, and has no {caption.name} beside it")
            item = _file_item(_as_key(str(name.with_suffix(""))), meta, [path])
            if (first := of_key.setdefault(item.key, path)) != path:
                raise ValueError(f"key {item.key!r} comes 2 times, first of {first}; rename one")
            items.append(item)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    return items, problems


def _caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"its caption {path.name} cannot be read as UTF-8 text: {error}") from error


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
    Its key is the id, with ``-0``, ``-1``, … where there are several questions. Ids may repeat (LLaVA's are those of
    COCO's images): from the second on, a record's number stands behind its id in the key.
    Chats as other tools keep them are read, too: ``images`` and ``messages``, ``role`` (user, assistant) and ``content``,
    a text or a list of ``{"type": "text", "text": …}`` and ``{"type": "image", "path": …}``.
    Source: Liu et al. 2023, arXiv 2304.08485, and its repository's data format.

    Args:
        file: the records.
        images: the folder that their images' paths start from, and stay in.

    Raises:
        ConfigError: the file is not such a list.
    """
    items, problems = [], []
    keys = _Keys()
    for number, record in enumerate(_records(file)):
        try:
            turns = _turns(record)
            name = str(record.get("id", number))
            own_keys = keys.of(_as_key(name), number, len(turns) // 2)  # even if images are missing: keys stay the same
            paths = _paths(record, turns, images)
            metas = [{"id": name, "question": asked, "answers": [told]} for asked, told in _pairs(turns)]
            items += [_file_item(key, meta, paths) for key, meta in zip(own_keys, metas, strict=True)]
        except KeyError as error:
            problems.append(f"{file}: record {number}: a turn has no {error}")
        except (AttributeError, TypeError) as error:
            problems.append(f"{file}: record {number}: {type(error).__name__}: {error}")
        except ValueError as error:
            problems.append(f"{file}: record {number}: {error}")
    return items, problems


class _Keys:
    """Keys of records whose ids may repeat."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._keys: set[str] = set()

    def of(self, name: str, number: int, count: int) -> list[str]:
        """``count`` keys for record ``number``; those of the same records are always the same."""
        free = f"{name}-{number}" if name in self._ids else name
        self._ids.add(name)
        while not self._keys.isdisjoint(keys := [free] if count == 1 else [f"{free}-{i}" for i in range(count)]):
            free = f"{free}-{number}"
        self._keys.update(keys)
        return keys


Turn = tuple[str, str, list[str]]


def _turns(record: Any) -> list[Turn]:
    """Who speaks, the text, and paths of images that stand in it, of each turn."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {record!r:.80}")
    given = record.get("conversations", record.get("messages"))
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected turns in `conversations` or `messages`, found {given!r:.80}")
    return [_turn(turn) for turn in given]


def _turn(turn: dict[str, Any]) -> Turn:
    speaker, content = turn["from" if "from" in turn else "role"], turn["value" if "value" in turn else "content"]
    if isinstance(content, str):
        return speaker, content, []
    texts = [part["text"] for part in content if part["type"] == "text"]
    paths = [part["path"] for part in content if part["type"] == "image" and "path" in part]
    return speaker, "\n".join(texts), paths


def _pairs(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    pairs = []
    for number in range(0, len(turns), 2):
        asks, question, _ = turns[number]
        if number + 1 == len(turns):
            raise ValueError(f"turn {number}: {_PAIR}, found {asks} and no turn after it")
        answers, answer, _ = turns[number + 1]
        if asks not in ("human", "user") or answers not in ("gpt", "assistant"):
            raise ValueError(f"turn {number}: {_PAIR}, found {asks}, {answers}")
        pairs.append((question.replace("<image>", "").strip(), answer.strip()))
    return pairs


def _paths(record: dict[str, Any], turns: Sequence[Turn], images: Path) -> list[Path]:
    given = record.get("image") or record.get("images") or [path for _, _, shown in turns for path in shown]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected an image's path, or a list of such, found {given!r:.80}")
    for name in names:
        if not stays_inside(images, name):
            raise ValueError(f"image {name!r} does not stay in the folder of images, {images}")
        if PurePosixPath(name).suffix[1:].lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"image {name!r} is none of {', '.join(IMAGE_EXTENSIONS)}")
    return [images / name for name in names]


def _records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines() cuts at U+2028, too
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: expected a JSON list, or a JSON object a line ({error})") from error


def _as_key(name: str) -> str:
    """A name as a key: dots, which would begin the extension, and what file systems may not take, become ``_``."""
    return re.sub(r"[.\\\x00-\x1f]", "_", name.strip().strip("/"))
