"""Encoded samples to decoded ones.

Nothing that is read can run code: images are decoded by PIL's JPEG, PNG and WebP readers alone, the rest is JSON or
text. Every error names the shard and the key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from digrap_scale.data.splitting import Span
from digrap_scale.data.tar import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, Offsets, SampleError, ShardReader

MAX_IMAGE_PIXELS = 64 * 2**20


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes to RGB; transparent pixels go onto white.

    Raises:
        SampleError: not a whole JPEG, PNG or WebP image, or more than ``MAX_IMAGE_PIXELS`` pixels.
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
        raise SampleError(f"{where}: the image cannot be decoded: {type(error).__name__}: {error}") from error
    raise SampleError(f"{where}: the image has {image.width}×{image.height} pixels, limit {MAX_IMAGE_PIXELS} in all")


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
        SampleError: not UTF-8 JSON, or not an object.
    """
    try:
        meta = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: the JSON cannot be decoded: {error}") from error
    if not isinstance(meta, dict):
        raise SampleError(f"{where}: the JSON is a {type(meta).__name__}, expected an object")
    return meta


def decode_meta(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON's object, and beside its keys the texts of ``txt`` and ``cls`` members, under these names.

    Raises:
        SampleError: none of the three is there; JSON or text cannot be decoded.
    """
    if not any(extension in raw for extension in TEXT_EXTENSIONS):
        raise SampleError(f"{where}: has no json; a sample's members must stand next to each other in the tar file")
    meta = decode_json(raw["json"], where) if "json" in raw else {}
    for extension in ("txt", "cls"):
        if extension in raw:
            try:
                meta.setdefault(extension, raw[extension].decode("utf-8").strip())
            except ValueError as error:
                raise SampleError(f"{where}: the {extension} cannot be decoded: {error}") from error
    return meta


def decode_sample(raw: dict[str, Any]) -> dict[str, Any]:
    """A grouped sample of webdataset → ``key``, ``shard``, ``image`` (PIL, RGB), ``meta`` (dict)."""
    where = f"{raw['__url__']}: sample {raw['__key__']}"
    images = [extension for extension in IMAGE_EXTENSIONS if extension in raw]
    if len(images) != 1:
        found = " and ".join(images) or "none"
        raise SampleError(f"{where}: expected one image ({', '.join(IMAGE_EXTENSIONS)}), found {found}")
    return {
        "key": raw["__key__"],
        "shard": raw["__url__"],
        "meta": decode_meta(raw, where),
        "image": decode_image(raw[images[0]], where),
    }


def samples_of(
    spans: Iterable[Span], paths: Sequence[Path], offsets: Sequence[Offsets | None] | None = None, skip: bool = False
) -> Iterator[dict[str, Any]]:
    """The decoded samples of ``spans``, in order, without the bad ones if ``skip``; see ``ShardReader``.

    Raises:
        ConfigError: a broken shard or, unless ``skip``, a bad sample, by name.
    """
    reader = ShardReader(paths, offsets, skip)
    try:
        for span in spans:
            for index in range(span.start, span.stop):
                try:
                    yield decode_sample(reader.read(span.shard, index))
                except SampleError:
                    if not skip:
                        raise
    finally:
        reader.close()
