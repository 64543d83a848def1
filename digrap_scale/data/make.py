"""Samples to shards: in parallel, within limits of count and bytes, and on from where a killed run stopped.

The samples are listed first (``listing.py``, ``hugging_face.py``, ``benchmarks/``), with every problem at once. The list is
cut into shards by count and bytes, and each shard is written by one of several processes, in a hidden folder beside, under
its own name only when it is whole. A run that is killed goes on with the shards that are missing, as far as the others'
samples are the same; when all are there they are counted, summed and moved into place, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import webdataset as wds

from digrap_scale.data.manifest import Manifest, index_shards, replacing
from digrap_scale.data.orphans import end_with_parent
from digrap_scale.data.reading import IMAGE_COUNT
from digrap_scale.data.shards import FIXED_MEMBER_FIELDS, PREFIX, check_key, publish_shards
from digrap_scale.data.tar import HEADER_BYTES, SampleError
from digrap_scale.errors import ConfigError, PeerError, SaveError
from digrap_scale.process_lock import ProcessLock

PLAN_FILE = "plan.json"
MAX_SHOWN_PROBLEMS = 50

Images = Callable[[], list[tuple[str, bytes]]]


@dataclass(frozen=True)
class Item:
    """A sample to be written.

    Attributes:
        key: unique.
        meta: the JSON's content; ``image_count`` is added to it.
        images: gives (extension, encoded image) of each, in the writing process; raises OSError, ValueError or
            SampleError where one cannot be used.
        image_bytes: of each image; None: not known before they are read.
        stamps: numbers that change where images change and their sizes do not: times of files.
    """

    key: str
    meta: dict[str, Any]
    images: Images
    image_bytes: tuple[int, ...] | None = None
    stamps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Made:
    """What came out: the manifest, and a line for each sample that was left out because its images cannot be used."""

    manifest: Manifest
    left_out: tuple[str, ...]


def make_shards(
    items: Sequence[Item],
    folder: Path,
    *,
    prefix: str,
    samples_per_shard: int,
    shard_bytes: int | None = None,
    processes: int = 1,
    skip: bool = False,
) -> Made:
    """Writes ``PREFIX-000000.tar`` … and their manifest; goes on where an earlier, killed run stopped.

    Args:
        items: unique keys, in order.
        folder: where to; made if it is missing. An earlier set of the same prefix is replaced at the end.
        prefix: letters, digits, ``. _ -``.
        samples_per_shard: at most.
        shard_bytes: of a shard's file, at most, unless it holds one sample; None: as the count has it.
        processes: shards written at a time.
        skip: leave out samples whose images cannot be used, and tell of it; a shard of none but such is not made.

    Raises:
        ConfigError: no items, a bad or repeated key, images that cannot be used (unless ``skip``), images of unknown
            size with ``shard_bytes``; another run makes the same shards.
        PeerError: a process was killed.
        SaveError: the disk refuses.
    """
    _check(items, prefix, samples_per_shard, shard_bytes)
    shards = list(_cut(items, samples_per_shard, shard_bytes))
    try:
        with _alone(folder, prefix):
            making = folder / f".{prefix}.making"
            paths = [making / f"{prefix}-{number:06d}.tar" for number in range(len(shards))]
            _begin(making, paths, [_digest(shard) for shard in shards])
            if not skip and (known := [line for path in paths if path.exists() for line in _left_out(path)]):
                raise ConfigError(_first(known))
            left = [(path, shard) for path, shard in zip(paths, shards, strict=True) if not path.exists()]
            _write_all(left, processes, skip)
            left_out = [_left_out(path) for path in paths]
            filled = [
                path for path, shard, lines in zip(paths, shards, left_out, strict=True) if len(lines) < len(shard)
            ]
            if not filled:
                raise ConfigError(f"no samples for shards {prefix}-*.tar: all were left out (first: {left_out[0][0]})")
            manifest, _ = index_shards(filled, prefix, processes=processes)
            publish_shards(manifest, making, folder, prefix)
            shutil.rmtree(making)
    except BrokenProcessPool as error:
        raise PeerError(
            f"{folder}: a process that made shards {prefix}-*.tar was killed (out of memory?); the same command goes on "
            "where it stopped, with fewer processes if memory is short"
        ) from error
    except OSError as error:
        raise SaveError(f"{folder}: shards {prefix}-*.tar could not be written: {error}") from error
    return Made(manifest, tuple(line for lines in left_out for line in lines))


def _check(items: Sequence[Item], prefix: str, samples_per_shard: int, shard_bytes: int | None) -> None:
    problems = [problem for item in items if (problem := check_key(item.key)) is not None]
    problems += [f"key {key!r} comes {n} times" for key, n in Counter(i.key for i in items).items() if n > 1]
    if not PREFIX.fullmatch(prefix):
        problems.append(f"shard prefix {prefix!r}: expected letters, digits, '.', '_' or '-'")
    if samples_per_shard < 1:
        problems.append(f"samples_per_shard {samples_per_shard}: expected 1 or more")
    if not items:
        problems.append(f"no samples for shards {prefix}-*.tar")
    if shard_bytes is not None and (unknown := next((i.key for i in items if i.image_bytes is None), None)) is not None:
        problems.append(f"shard_bytes: sample {unknown} has images of unknown size; give samples_per_shard alone")
    if problems:
        raise ConfigError(_first(problems))


def _first(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_SHOWN_PROBLEMS
    return problems[:MAX_SHOWN_PROBLEMS] + ([f"… and {more} more problems"] if more > 0 else [])


@contextmanager
def _alone(folder: Path, prefix: str) -> Iterator[None]:
    """No other run makes these shards meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = ProcessLock(folder / f".{prefix}.lock")
    if not lock.acquire():
        raise ConfigError(f"{folder}: another run makes shards {prefix}-*.tar; wait for it, or give another prefix")
    try:
        yield
    finally:
        lock.release()


def _begin(making: Path, paths: Sequence[Path], digests: Sequence[str]) -> None:
    """Keeps the shards of a killed run whose samples are the same, and no others."""
    plan = making / PLAN_FILE
    making.mkdir(parents=True, exist_ok=True)
    try:
        planned = json.loads(plan.read_text())
    except (OSError, ValueError):  # none, or half of one
        planned = []
    kept = {PLAN_FILE}
    for path, new, old in zip(paths, digests, planned if isinstance(planned, list) else [], strict=False):
        kept |= {path.name, _report(path).name} if new == old else set()
    for file in making.iterdir():
        if file.name not in kept:
            file.unlink()
    with replacing(plan) as stream:
        stream.write(json.dumps(list(digests)).encode())


def _digest(shard: Sequence[Item]) -> str:
    """Changes with keys, JSON, and sizes or times of images."""
    digest = hashlib.sha256()
    for item in shard:
        digest.update(json.dumps([item.key, item.meta, item.image_bytes, item.stamps], sort_keys=True).encode())
    return digest.hexdigest()


def _cut(items: Iterable[Item], samples_per_shard: int, shard_bytes: int | None) -> Iterator[list[Item]]:
    shard: list[Item] = []
    size = 0
    for item in items:
        own = 0 if shard_bytes is None else _tar_bytes(item)
        if shard and (len(shard) >= samples_per_shard or (shard_bytes is not None and _file(size + own) > shard_bytes)):
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += own
    if shard:
        yield shard


def _tar_bytes(item: Item) -> int:
    """What a sample takes of its shard; a bit more where an image's extension may be shorter than is reckoned here."""
    assert item.image_bytes is not None  # _check()
    sizes = [*item.image_bytes, len(_json(item, len(item.image_bytes)).encode("utf-8", "replace"))]
    names = [*_image_names(["jpeg"] * len(item.image_bytes)), "json"]
    return sum(_header(f"{item.key}.{name}") + _up(size, HEADER_BYTES) for name, size in zip(names, sizes, strict=True))


def _header(name: str) -> int:
    """Bytes before a member's content: names that are long or not ASCII have a header of their own."""
    if len(name) <= tarfile.LENGTH_NAME and name.isascii():
        return HEADER_BYTES
    return len(tarfile.TarInfo(name).tobuf(tarfile.DEFAULT_FORMAT, "utf-8", "surrogateescape"))


def _file(members: int) -> int:
    """A tar file's size: an end mark of two empty headers, and whole records."""
    return _up(members + 2 * HEADER_BYTES, tarfile.RECORDSIZE)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _image_names(extensions: Sequence[str]) -> list[str]:
    return [f"{i}.{extension}" if len(extensions) > 1 else extension for i, extension in enumerate(extensions)]


def _json(item: Item, images: int) -> str:
    """Sorted, for equal bytes."""
    return json.dumps({**item.meta, IMAGE_COUNT: images}, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _write_all(left: Sequence[tuple[Path, Sequence[Item]]], processes: int, skip: bool) -> None:
    if min(processes, len(left)) <= 1:
        for path, shard in left:
            _write_shard(path, shard, skip)
        return
    # Processes of a killed run must not write on while the next one goes on with the same shards.
    with ProcessPoolExecutor(min(processes, len(left)), initializer=end_with_parent) as pool:
        list(pool.map(_write_shard, *zip(*left, strict=True), repeat(skip)))


def _write_shard(path: Path, items: Sequence[Item], skip: bool) -> None:
    left_out = []
    with replacing(path) as stream:
        with wds.TarWriter(stream, **FIXED_MEMBER_FIELDS) as writer:
            for item in items:
                try:
                    images = item.images()
                    text = _json(item, len(images)).encode()
                except (OSError, ValueError, SampleError) as error:
                    problem = f"sample {item.key} cannot be written: {error}"
                    if not skip:
                        raise ConfigError(problem) from error
                    left_out.append(problem)
                    continue
                names = _image_names([extension for extension, _ in images])
                members = {name: content for name, (_, content) in zip(names, images, strict=True)}
                writer.write({"__key__": item.key, **members, "json": text})
        with replacing(_report(path)) as report:  # before the shard has its name: a finished shard has its report
            report.write(json.dumps(left_out).encode())


def _report(path: Path) -> Path:
    return path.with_suffix(".left_out.json")


def _left_out(path: Path) -> list[str]:
    """What a finished shard lacks."""
    return [str(line) for line in json.loads(_report(path).read_text())]
