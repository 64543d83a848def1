"""The pictogram tools: the split, rendering, captions, the pin of a package."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

pytest.importorskip("resvg_py")

import pictograms as pg  # noqa: E402


def test_split_is_balanced_and_keeps_families_together() -> None:
    split = pg.make_split()
    table = json.loads(pg.CONCEPTS_FILE.read_text(encoding="utf-8"))
    assert len(split.label) == sum(len(entry["concepts"]) for entry in table["classes"].values()), (
        "a concept in two classes"
    )
    sizes, held = Counter(split.label.values()), Counter(split.label[concept] for concept in split.test)
    assert all(abs(held[name] - pg.TEST_SHARE * sizes[name]) <= 2 for name in sizes)
    for family in table["families"]:
        assert len({concept in split.test for concept in family}) == 1, family
        assert set(family) <= set(split.label), family


def test_relatives_of_test_concepts_are_recognised() -> None:
    test = frozenset({"cat", "fire-engine"})
    assert (
        pg.related("grinning-cat", test)
        and pg.related("cat-with-wry-smile", test)
        and pg.related("old-fire-engine", test)
    )
    assert not pg.related("catfish", test) and not pg.related("fire", test) and not pg.related("engine-fire", test)


@pytest.mark.parametrize(
    ("concept", "text"),
    [
        ("fire-engine", "a drawing of a fire engine"),
        ("owl", "a drawing of an owl"),
        ("glasses", "a drawing of glasses"),
        ("octopus", "a drawing of an octopus"),
        ("wine-glass", "a drawing of a wine glass"),
    ],
)
def test_captions(concept: str, text: str) -> None:
    assert pg.caption(concept) == text
    assert pg.caption(concept, "a drawing of a thing") == f"{text}, a thing"


def iconify_package(path: Path, body: str, **box: int) -> Path:
    icons = json.dumps({"icons": {"thing": {"body": body}, "gone": {"body": "", "hidden": True}}, **box}).encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(icons)
        archive.addfile(member, io.BytesIO(icons))
    return path


def test_open_colour_is_drawn_black_on_white_and_centred(tmp_path: Path) -> None:
    body = '<rect width="20" height="5" fill="currentColor"/>'
    icons = pg.read_icons(iconify_package(tmp_path / "p.tgz", body, width=20, height=10))
    assert set(icons) == {"thing"}
    image = pg.render(icons["thing"], 64)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.getpixel((32, 20)) == (0, 0, 0)  # upper half of the drawing, which fills rows 16 to 47
    assert image.getpixel((32, 40)) == (255, 255, 255)
    assert image.getpixel((32, 5)) == (255, 255, 255)


def test_package_of_another_hash_is_refused(tmp_path: Path) -> None:
    style = pg.STYLES["noto"]
    (tmp_path / "iconify-json-noto-1.2.9.tgz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="SHA-512"):
        pg.fetch(style, tmp_path)
