"""Broken and hostile samples are refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from digrap_scale.data import reading
from digrap_scale.data.reading import decode_image, samples_of
from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.data.splitting import Span
from digrap_scale.data.tar import SampleError
from digrap_scale.errors import ConfigError
from tests.data.samples import encoded, make_samples, raw_tar, sample_members


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample_members("k", image=encoded()[:40]), "the image cannot be decoded"),
        (sample_members("k", image=b""), "the image cannot be decoded"),
        (
            [*sample_members("k"), ("k.jpg", encoded())],
            "expected one image, or several numbered from 0 (KEY.0.jpg …), found",
        ),
        ([*sample_members("k"), ("k.0.png", encoded())], "numbered from 0 (KEY.0.jpg …), found png and 0.png"),
        (
            [("k.json", b"{}"), ("k.0.png", encoded()), ("k.2.png", encoded())],
            "without gaps, each once; found 0.png, 2.png",
        ),
        (
            [("k.json", b"{}"), ("k.0.png", encoded()), ("k.0.jpg", encoded())],
            "without gaps, each once; found 0.jpg, 0.png",
        ),
        (sample_members("k")[1:], "has no json"),
        ([("k.json", b"{"), ("k.png", encoded())], "the JSON cannot be decoded"),
        ([("k.json", b"\xff\xfe"), ("k.png", encoded())], "the JSON cannot be decoded"),
        ([("k.json", b"[" * 200_000), ("k.png", encoded())], "the JSON cannot be decoded"),
        ([("k.json", b"[]"), ("k.png", encoded())], "the JSON is a list"),
        ([*sample_members("k"), ("k.png", encoded())], "has the same member twice"),
        ([("k.json", b"{}"), ("k.png", encoded()), ("k.JSON", b"{}")], "has the same member twice"),
    ],
)
def test_broken_samples_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = raw_tar(tmp_path / "x.tar", [*sample_members("good"), *members])
    with pytest.raises(ConfigError) as error:
        list(samples_of([Span(0, 0, 2)], [path]))
    assert message in str(error.value) and str(error.value).startswith(f"{path}: sample k")
    assert len(str(error.value).splitlines()) == 1


def test_several_images_are_in_order_and_none_is_allowed(tmp_path: Path) -> None:
    several = [(f"k.{number}.png", encoded((number, 0, 0))) for number in (10, 2, 1, 0, *range(3, 10))]
    members = [("k.json", b"{}"), *several, ("text.json", b'{"question": "?"}'), *sample_members("one")]
    first, second, third = samples_of([Span(0, 0, 3)], [raw_tar(tmp_path / "x.tar", members)])
    assert [image.getpixel((0, 0))[0] for image in first["images"]] == list(range(11))
    assert first["image"] is first["images"][0] and third["images"] == [third["image"]]
    assert second["images"] == [] and "image" not in second


def test_an_image_that_is_missing_is_told_by_the_count(tmp_path: Path) -> None:
    """Without it a question without its image is a sample as good as any."""
    members = [("k.json", b'{"image_count": 2}'), ("k.0.png", encoded()), ("k.1.png", encoded())]
    (sample,) = samples_of([Span(0, 0, 1)], [raw_tar(tmp_path / "x.tar", members)])
    assert len(sample["images"]) == 2
    for fewer in (members[:2], members[:1]):
        with pytest.raises(SampleError, match=r"sample k: expected 2 images by its image_count, found \d"):
            list(samples_of([Span(0, 0, 1)], [raw_tar(tmp_path / "x.tar", fewer)]))


def test_the_pixels_of_a_sample_have_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images that are each small enough."""
    monkeypatch.setattr(reading, "MAX_SAMPLE_PIXELS", 200)
    members = [("k.json", b"{}"), *((f"k.{i}.png", encoded(size=8)) for i in range(50))]
    with pytest.raises(SampleError, match="sample k: its images have 256 pixels and more, limit 200 in all"):
        list(samples_of([Span(0, 0, 1)], [raw_tar(tmp_path / "x.tar", members)]))


@pytest.mark.parametrize("name", ["k.00.png", "k.-1.png", "k.a.png", "k.1.json", "k.png.0"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    path = raw_tar(tmp_path / "x.tar", [("k.json", b"{}"), (name, encoded())])
    with pytest.raises(ConfigError, match="KEY.0.EXTENSION"):
        list(samples_of([Span(0, 0, 1)], [path]))


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(ConfigError, match="x: the image has 8×8 pixels"):
        decode_image(encoded(size=8), "x")


def test_only_the_three_formats_are_decoded() -> None:
    for extension in ("gif", "bmp", "tiff", "eps"):
        with pytest.raises(ConfigError, match="cannot be decoded"):
            decode_image(encoded(extension=extension), "x")


def test_transparency_goes_onto_white() -> None:
    assert decode_image(encoded((255, 0, 0, 0)), "x").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded((0, 0, 0, 128), extension="webp"), "x").getpixel((0, 0))[0] in range(125, 130)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    stream = io.BytesIO()
    palette.save(stream, "png", transparency=1)
    assert decode_image(stream.getvalue(), "x").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded((1, 2, 3), extension="png"), "x").getpixel((0, 0)) == (1, 2, 3)


def test_spans_start_inside_shards_and_go_back(tmp_path: Path) -> None:
    write_shards(make_samples(12), tmp_path, prefix="p", samples_per_shard=6)
    shards = ShardSet.open([f"{tmp_path}/p-*.tar"])
    spans = [Span(0, 2, 4), Span(0, 5, 6), Span(0, 1, 2), Span(1, 0, 1), Span(0, 0, 2)]
    assert [s["meta"]["number"] for s in samples_of(spans, shards.paths, shards.offsets)] == [2, 3, 5, 1, 6, 0, 1]


def test_texts_stand_beside_the_json(tmp_path: Path) -> None:
    members = [("a.png", encoded()), ("a.txt", b"a cat\n"), ("a.cls", b"3"), *sample_members("b", {"cls": "own"})]
    path = raw_tar(tmp_path / "x.tar", [*members, ("b.cls", b"4"), ("c.png", encoded()), ("c.txt", b"\xff")])
    first, second = samples_of([Span(0, 0, 2)], [path])
    assert (first["meta"], second["meta"]) == ({"txt": "a cat", "cls": "3"}, {"cls": "own"})
    with pytest.raises(SampleError, match="x.tar: sample c: the txt cannot be decoded"):
        list(samples_of([Span(0, 2, 3)], [path]))
