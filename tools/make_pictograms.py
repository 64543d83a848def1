"""Make the pictogram shards: the demo's (vendored) or the wide set that the foundation model is aligned on.

    python tools/make_pictograms.py --set demo --out digrap_scale/demo/assets/pictograms [--check]
    python tools/make_pictograms.py --set alignment --out runs/foundation/shards

Both need npm and resvg-py. The packages are fetched once (``--packages``), checked against their pinned SHA-512,
rendered at 64 px on white, and packed with the data room's ``write_shards``. With the same resvg-py and Pillow the
bytes come out the same; ``--check`` makes them again in a temporary folder and compares.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictograms as pg

from digrap_scale.data.shards import write_shards

SIZE = 64
DEMO_QUALITY = 50  # the vendored set stays small
ALIGNMENT_QUALITY = 80
# The eighth style, fluent-emoji, is left out of the demo for its size: fluent-emoji-flat draws the same shapes.
DEMO_TEST_STYLES = tuple(style for style in pg.STYLES if style != "fluent-emoji")
DEMO_TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
SKIPPED_WORDS = ("skin-tone", "letter-", "keycap-", "flag-")  # variants and glyphs, no things to name
LEAST_STYLES = 4


def demo_samples(icons: dict[str, str], split: pg.Split, style: str, part: str) -> Iterator[dict[str, Any]]:
    """The labelled concepts of one style and part ("train" or "test"), by name."""
    for concept in sorted(split.label):
        if concept in icons and (concept in split.test) == (part == "test"):
            yield sample(icons, concept, style, split.label.get(concept), DEMO_QUALITY)


def alignment_concepts(icons: dict[str, dict[str, str]], split: pg.Split) -> list[str]:
    """Concepts drawn in ``LEAST_STYLES`` or more of the alignment styles; no test concepts, nor their relatives."""
    names = sorted(set().union(*(icons[style] for style in pg.ALIGNMENT_STYLES)))
    return [
        name
        for name in names
        if not any(word in name for word in SKIPPED_WORDS)
        and sum(name in icons[style] for style in pg.ALIGNMENT_STYLES) >= LEAST_STYLES
        and name not in split.test
        and (name in split.label or not pg.related(name, split.test))
    ]


def alignment_samples(icons: dict[str, dict[str, str]], split: pg.Split) -> Iterator[dict[str, Any]]:
    """Every alignment concept in every alignment style that draws it, with its caption.

    In the order of a hash of style and concept: drawings of one concept must not follow each other, because a loader
    shuffles within a limited buffer.
    """
    concepts = alignment_concepts(icons, split)
    pairs = [(style, concept) for concept in concepts for style in pg.ALIGNMENT_STYLES if concept in icons[style]]
    for style, concept in sorted(pairs, key=lambda pair: hashlib.sha256("/".join(pair).encode()).hexdigest()):
        yield sample(icons[style], concept, style, split.label.get(concept), ALIGNMENT_QUALITY)


def sample(icons: dict[str, str], concept: str, style: str, label: str | None, quality: int) -> dict[str, Any]:
    """One sample as ``write_shards`` takes it; ``label`` is left out of the JSON where there is none."""
    meta = {"caption": caption_of(concept, label), "concept": concept, "style": style}
    if label is not None:
        meta["label"] = label
    image = pg.encode(pg.render(icons[concept], SIZE), quality)
    return {"key": f"{style}-{concept}", "image": image, "extension": "webp", "meta": meta}


def caption_of(concept: str, label: str | None) -> str:
    """The concept's caption; it tells the kind of a labelled concept."""
    return pg.caption(concept, None if label is None else pg.read_classes()[label])


def write_demo(folder: Path, packages: Path) -> None:
    """Train and test shards of the demo's styles (test only for the others), and ``classes.json``."""
    split = pg.make_split()
    for style in DEMO_TEST_STYLES:
        icons = pg.read_icons(pg.fetch(pg.STYLES[style], packages))
        for part in ("train", "test") if style in DEMO_TRAIN_STYLES else ("test",):
            write_shards(
                demo_samples(icons, split, style, part), folder, prefix=f"{style}-{part}", samples_per_shard=1000
            )
    (folder / "classes.json").write_text(json.dumps(pg.read_classes(), indent=1) + "\n", encoding="utf-8")


def write_alignment(folder: Path, packages: Path) -> None:
    """Shards of captioned pictograms, and ``captions.json`` (the sorted list of all captions)."""
    split = pg.make_split()
    icons = {style: pg.read_icons(pg.fetch(pg.STYLES[style], packages)) for style in pg.ALIGNMENT_STYLES}
    write_shards(alignment_samples(icons, split), folder, prefix="alignment", samples_per_shard=2000)
    captions = sorted({caption_of(concept, split.label.get(concept)) for concept in alignment_concepts(icons, split)})
    (folder / "captions.json").write_text(json.dumps(captions, indent=0) + "\n", encoding="utf-8")
    (folder / "classes.json").write_text(json.dumps(pg.read_classes(), indent=1) + "\n", encoding="utf-8")


def differences(made: Path, kept: Path) -> list[str]:
    """Names of files that differ between two folders, or are in one only."""
    names = sorted({path.name for folder in (made, kept) for path in folder.glob("*") if path.is_file()})
    return [
        name
        for name in names
        if not (
            (made / name).exists() and (kept / name).exists() and filecmp.cmp(made / name, kept / name, shallow=False)
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status (1 when ``--check`` finds a difference)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="which", choices=("demo", "alignment"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to compare with")
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where fetched packages are kept")
    parser.add_argument("--check", action="store_true", help="write nothing; make the files again and compare them")
    options = parser.parse_args(arguments)
    write = write_demo if options.which == "demo" else write_alignment
    if not options.check:
        write(options.out, options.packages)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.packages)
        wrong = differences(Path(folder), options.out)
    print(f"{options.out}: " + (f"{len(wrong)} file(s) differ: {', '.join(wrong)}" if wrong else "all files as made"))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
