"""From tar files to decoded samples: webdataset's grouping and pipeline, with a reader that can start inside a shard.

A sample is ``KEY.json`` beside its images: ``KEY.jpg`` (one), ``KEY.0.jpg``, ``KEY.1.jpg``, … (several, in order), or none.

Nothing that is read can run code: only plain tar files are opened, only images and JSON are accepted, images are
decoded by PIL's JPEG, PNG and WebP readers alone. Every error names the shard and the key.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from webdataset.tariterators import group_by_keys

from digrap_scale.data.splitting import Span
from digrap_scale.errors import ConfigError

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png")
EXTENSIONS = (*IMAGE_EXTENSIONS, "json")
_EXTENSION = re.compile(rf"json|(?:(0|[1-9]\d{{0,3}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")
MAX_IMAGE_PIXELS = 64 * 2**20
MAX_MEMBER_BYTES = 256 * 2**20


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """``a/b.webp`` → (``a/b``, ``webp``): the extension starts at the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not _EXTENSION.fullmatch(extension.lower()):
        raise ConfigError(
            f"{path}: member {name!r}: expected KEY.EXTENSION with one of {', '.join(EXTENSIONS)}, or KEY.0.EXTENSION, "
            "KEY.1.EXTENSION … for several images"
        )
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class TarCursor:
    """Walks through one shard sample by sample, forwards only, and skips over data that nobody asks for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next_sample = 0
        self._pending: tarfile.TarInfo | None = None
        try:
            self._tar = tarfile.open(path, mode="r:")
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{path}: cannot be read as a plain tar file: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._tar.close()

    def _next_member(self) -> tarfile.TarInfo | None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return pending
        while True:
            try:
                member = self._tar.next()
            except (OSError, tarfile.TarError) as error:
                raise ConfigError(f"{self.path}: broken after sample {self.next_sample}: {error}") from error
            self._tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member
            if member is None or not member.isdir():
                return member

    def skip(self) -> bool:
        """Moves over one sample; False at the end of the shard."""
        return any([True for _ in self._members(read=False)])

    def read(self) -> list[dict[str, Any]]:
        """One sample's members as webdataset passes them (``fname``, ``data``, ``__url__``); empty at the end."""
        return list(self._members(read=True))

    def _members(self, read: bool) -> Iterator[dict[str, Any]]:
        key: str | None = None
        while (member := self._next_member()) is not None:
            member_key, _ = _split_name(self.path, member.name)
            if key is not None and member_key != key:
                self._pending = member
                break
            key = member_key
            if not member.isreg():
                raise ConfigError(f"{self.path}: member {member.name!r} is not a regular file")
            yield {"fname": member.name, "data": self._data(member) if read else b"", "__url__": str(self.path)}
        self.next_sample += key is not None

    def _data(self, member: tarfile.TarInfo) -> bytes:
        if member.size > MAX_MEMBER_BYTES:
            raise ConfigError(f"{self.path}: {member.name} has {member.size} bytes, limit {MAX_MEMBER_BYTES}")
        try:
            stream = self._tar.extractfile(member)
            assert stream is not None  # a regular file always has one
            return stream.read()
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{self.path}: {member.name} cannot be read: {error}") from error


def count_samples(path: Path) -> int:
    """Samples in a shard, found by walking through its headers.

    Raises:
        ConfigError: it is not a plain tar file, is cut off, or has a member that does not belong in a shard.
    """
    cursor = TarCursor(path)
    try:
        while cursor.skip():
            continue
    finally:
        cursor.close()
    return cursor.next_sample


def read_members(spans: Iterable[Span], paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The members of all samples in ``spans``; ``{}`` after each sample, which is webdataset's end mark for a group."""
    cursor: TarCursor | None = None
    try:
        for span in spans:
            path = paths[span.shard]
            if cursor is None or cursor.path != path or cursor.next_sample > span.start:
                if cursor is not None:
                    cursor.close()
                cursor = TarCursor(path)
            while cursor.next_sample < span.stop:
                wanted = cursor.next_sample >= span.start
                members = cursor.read() if wanted else None
                if members == [] or (members is None and not cursor.skip()):
                    raise ConfigError(
                        f"{path}: ends after {cursor.next_sample} samples, expected {span.stop} or more: "
                        "the file changed after it was counted; rewrite the shards or delete their manifest"
                    )
                if members:
                    _refuse_duplicates(path, members)
                    yield from members
                    yield {}
    finally:
        if cursor is not None:
            cursor.close()


def _refuse_duplicates(path: Path, members: list[dict[str, Any]]) -> None:
    extensions = [_split_name(path, member["fname"])[1] for member in members]
    if len(set(extensions)) != len(extensions):
        raise ConfigError(f"{path}: sample {_split_name(path, members[0]['fname'])[0]} has the same member twice")


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes to RGB; transparent pixels go onto white.

    Raises:
        ConfigError: not a whole JPEG, PNG or WebP image, or more than ``MAX_IMAGE_PIXELS`` pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        pixels = image.width * image.height
        if pixels <= MAX_IMAGE_PIXELS:
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # decoders raise almost anything on damaged input
        raise ConfigError(f"{where}: the image cannot be decoded: {type(error).__name__}: {error}") from error
    raise ConfigError(f"{where}: the image has {image.width}×{image.height} pixels, limit {MAX_IMAGE_PIXELS} in all")


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
        ConfigError: not UTF-8 JSON, or not an object.
    """
    try:
        meta = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: the JSON cannot be decoded: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{where}: the JSON is a {type(meta).__name__}, expected an object")
    return meta


def decode_sample(raw: dict[str, Any]) -> dict[str, Any]:
    """A grouped sample of webdataset → ``key``, ``shard``, ``meta`` (dict), ``images`` (list of PIL, RGB, in order, maybe
    empty) and, where there is one, ``image`` (the first)."""
    where = f"{raw['__url__']}: sample {raw['__key__']}"
    if "json" not in raw:
        raise ConfigError(f"{where}: has no json; a sample's members must stand next to each other in the tar file")
    images = [decode_image(raw[member], where) for member in _image_members(raw, where)]
    sample: dict[str, Any] = {
        "key": raw["__key__"],
        "shard": raw["__url__"],
        "images": images,
        "meta": decode_json(raw["json"], where),
    }
    return {**sample, "image": images[0]} if images else sample


def _image_members(raw: dict[str, Any], where: str) -> list[str]:
    """The extensions of a sample's images, in order."""
    found: dict[int | None, list[str]] = {}
    for extension in raw:
        match = _EXTENSION.fullmatch(extension)
        if match and extension != "json":
            found.setdefault(None if match[1] is None else int(match[1]), []).append(extension)
    names = [name for of_number in found.values() for name in of_number]
    if None in found and len(names) > 1:
        raise ConfigError(
            f"{where}: expected one image, or several numbered from 0 (KEY.0.jpg …), found {' and '.join(names)}"
        )
    numbers = sorted(number for number in found if number is not None)
    if numbers != list(range(len(numbers))) or len(names) != len(found):
        raise ConfigError(
            f"{where}: images are numbered from 0 without gaps, each once; found {', '.join(sorted(names))}"
        )
    return found[None] if None in found else [found[number][0] for number in numbers]


def samples_of(
    spans: Iterable[Span],
    paths: Sequence[Path],
    *,
    shuffle_buffer_samples: int = 0,
    shuffle_seed: str = "",
    decode: Callable[[dict[str, Any]], dict[str, Any]] = decode_sample,
) -> Iterator[dict[str, Any]]:
    """Reads, groups, shuffles (before decoding: encoded images are small) and decodes.

    Args:
        spans: what to read, in order; may be lazy.
        paths: the shards that the spans number.
        shuffle_buffer_samples: samples among which the next one is drawn; 0 or 1 keeps the order.
        shuffle_seed: fixes the draw.
    """
    stages: list[Any] = [lambda: read_members(spans, paths), group_by_keys]
    if shuffle_buffer_samples > 1:
        rng = random.Random(f"digrap-shuffle/{shuffle_seed}")
        stages.append(wds.filters.shuffle(shuffle_buffer_samples, initial=shuffle_buffer_samples, rng=rng))
    stages.append(wds.filters.map(decode))
    return iter(wds.DataPipeline(*stages))
