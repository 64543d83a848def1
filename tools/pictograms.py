"""Pictogram packages: fetch, verify, render; the split of concepts. Used by ``make_pictograms.py``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

CONCEPTS_FILE = Path(__file__).with_name("pictogram_concepts.json")
CAPTION_START = "a drawing of "
TEST_SHARE = 0.38  # of each class's concepts, held out in every style


@dataclass(frozen=True)
class Style:
    """One drawing style: an npm package, pinned by its SHA-512."""

    package: str
    version: str
    sha512: str
    licence: str
    author: str
    source: str


STYLES: dict[str, Style] = {
    "noto": Style(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "twemoji": Style(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    "fluent-emoji": Style(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-flat": Style(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-high-contrast": Style(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "emojione": Style(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One (EmojiTwo contributors)",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "emojione-monotone": Style(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "CC-BY-4.0",
        "Emoji One (EmojiTwo contributors)",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    "noto-v1": Style(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
}

# Fetched only: share-alike.
FETCHED_STYLES: dict[str, Style] = {
    "openmoji": Style(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "https://github.com/hfg-gmuend/openmoji",
    ),
}

# What the alignment sees. The two line styles stay unseen: high contrast is the demo's source, monotone a test.
ALIGNMENT_STYLES = ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "noto-v1")


@dataclass(frozen=True)
class Split:
    """Which concept belongs where.

    Attributes:
        label: concept → class, of the labelled concepts.
        test: labelled concepts that no training shard holds, in any style.
    """

    label: dict[str, str]
    test: frozenset[str]


def read_classes() -> dict[str, str]:
    """Class name → prompt, in the order of the labels."""
    return {
        name: entry["prompt"]
        for name, entry in json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))["classes"].items()
    }


def make_split() -> Split:
    """Hold out ``TEST_SHARE`` of each class's concepts.

    Concepts that are nearly one drawing (*cat*, *cat-face*; the phases of the moon) form families, which stay
    together. Their order is that of the SHA-256 of a family's first concept: the same on any machine.
    """
    table = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    family_of = {concept: tuple(family) for family in table["families"] for concept in family}
    label = {concept: name for name, entry in table["classes"].items() for concept in entry["concepts"]}
    test: set[str] = set()
    for entry in table["classes"].values():
        families = {family_of.get(concept, (concept,)) for concept in entry["concepts"]}
        room = round(TEST_SHARE * len(entry["concepts"]))
        for family in sorted(families, key=lambda family: hashlib.sha256(family[0].encode()).hexdigest()):
            if len(family) <= room:
                test.update(family)
                room -= len(family)
    return Split(label, frozenset(test))


def related(concept: str, test: frozenset[str]) -> bool:
    """Whether an unlabelled concept's name holds a test concept's whole name (*grinning-cat* holds *cat*)."""
    return any(f"-{name}-" in f"-{concept}-" for name in test)


def run_fetch(command: list[str], folder: Path, patterns: Iterable[str]) -> None:
    """Run a package client's ``command`` in ``folder``, which then holds a file of each of ``patterns``.

    Raises:
        RuntimeError: it failed, or a file is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode != 0 or not all(any(folder.glob(pattern)) for pattern in patterns):
        raise RuntimeError(f"{' '.join(command)} failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")


def fetch(style: Style, folder: Path) -> Path:
    """The style's package as a tar file in ``folder``, fetched through the npm client unless it lies there already.

    Raises:
        RuntimeError: npm failed, or the file is not the pinned one.
    """
    path = folder / f"{style.package.removeprefix('@').replace('/', '-')}-{style.version}.tgz"
    if not path.exists():
        run_fetch(["npm", "pack", f"{style.package}@{style.version}"], folder, [path.name])
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != style.sha512:
        raise RuntimeError(f"{path}: SHA-512 is {found}, expected {style.sha512}; remove the file and fetch again")
    return path


def read_icons(package: Path) -> dict[str, str]:
    """Concept → a whole SVG document, from an iconify package's ``icons.json``."""
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise RuntimeError(f"{package}: has no package/icons.json; is it an iconify package?")
        table: dict[str, Any] = json.load(member)
    icons = {}
    for name, icon in table["icons"].items():
        if icon.get("hidden"):
            continue
        left, top, width, height = (icon.get(key, table.get(key, default)) for key, default in _BOX)
        body = icon["body"].replace("currentColor", "#000")
        icons[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{body}</svg>'
        )
    return icons


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def render(svg: str, size: int) -> Image.Image:
    """Draw an SVG document on white: an RGB image of ``size`` × ``size`` pixels, the drawing centred."""
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size)))).convert("RGBA")
    drawn.thumbnail((size, size))
    page = Image.new("RGBA", (size, size), "white")
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return page.convert("RGB")


def encode(image: Image.Image, quality: int) -> bytes:
    """WebP bytes: lossless for pure greys (line drawings come out smaller that way), else lossy at ``quality``."""
    red, green, blue = image.split()
    grey = red.tobytes() == green.tobytes() == blue.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=grey, quality=100 if grey else quality, method=6)
    return buffer.getvalue()


def caption(concept: str, prompt: str | None = None) -> str:
    """What a drawing of ``concept`` is called: *fire-engine* → "a drawing of a fire engine".

    With its class's ``prompt`` ("a drawing of a land vehicle") the kind is told too, as captions often do:
    "a drawing of a fire engine, a land vehicle".
    """
    words = concept.replace("-", " ")
    plural = words.endswith("s") and not words.endswith(("ss", "us"))
    article = "" if plural else "an " if words[0] in "aeiou" else "a "
    kind = "" if prompt is None else ", " + prompt.removeprefix(CAPTION_START)
    return f"{CAPTION_START}{article}{words}{kind}"
