"""Encoded samples to decoded ones.

A sample is ``KEY.json``, ``KEY.txt`` or ``KEY.cls`` beside its images: ``KEY.jpg`` (one), ``KEY.0.jpg``, ``KEY.1.jpg``, …
(several, in order), or none.

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
from digrap_scale.data.tar import IMAGE_MEMBER, TEXT_EXTENSIONS, Offsets, SampleError, ShardReader

MAX_IMAGE_PIXELS = 64 * 2**20
MAX_SAMPLE_PIXELS = 4 * MAX_IMAGE_PIXELS  # of all images of a sample: a few bytes can stand for many pixels
IMAGE_COUNT = "image_count"  # in a sample's JSON: how many images it was made with


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
            if image.mode == "RGB":  # to convert it would copy all pixels
                image.load()
                return image
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
    """A grouped sample of webdataset → ``key``, ``shard``, ``meta`` (dict), ``images`` (list of PIL, RGB, in order, maybe
    empty) and, where there is one, ``image`` (the first)."""
    where = f"{raw['__url__']}: sample {raw['__key__']}"
    meta = decode_meta(raw, where)
    members = _image_members(raw, where)
    made_with = meta.get(IMAGE_COUNT, len(members))
    if made_with != len(members):
        raise SampleError(f"{where}: expected {made_with} images by its {IMAGE_COUNT}, found {len(members)}")
    images: list[Image.Image] = []
    pixels = 0
    for member in members:
        images.append(decode_image(raw[member], where))
        pixels += images[-1].width * images[-1].height
        if pixels > MAX_SAMPLE_PIXELS:
            raise SampleError(f"{where}: its images have {pixels} pixels and more, limit {MAX_SAMPLE_PIXELS} in all")
    sample: dict[str, Any] = {
        "key": raw["__key__"],
        "shard": raw["__url__"],
        "images": images,
        "meta": meta,
    }
    return {**sample, "image": images[0]} if images else sample


def _image_members(raw: dict[str, Any], where: str) -> list[str]:
    """The extensions of a sample's images, in order."""
    found: dict[int | None, list[str]] = {}
    for extension in raw:
        match = IMAGE_MEMBER.fullmatch(extension)
        if match:
            found.setdefault(None if match[1] is None else int(match[1]), []).append(extension)
    names = [name for of_number in found.values() for name in of_number]
    if None in found and len(names) > 1:
        raise SampleError(
            f"{where}: expected one image, or several numbered from 0 (KEY.0.jpg …), found {' and '.join(names)}"
        )
    numbers = sorted(number for number in found if number is not None)
    if numbers != list(range(len(numbers))) or len(names) != len(found):
        raise SampleError(
            f"{where}: images are numbered from 0 without gaps, each once; found {', '.join(sorted(names))}"
        )
    return found[None] if None in found else [found[number][0] for number in numbers]


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
