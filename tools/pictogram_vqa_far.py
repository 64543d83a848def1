"""Pictogram-VQA's far sets: photographs (tuxpaint's stamps, GPL-2: fetched, never kept here) and easy-vqa (MIT)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictograms as pg

from digrap_scale.demo import scenes

STAMPS = ("tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34")
EASY_VQA = ("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
STAMPS_FOLDER = "usr/share/tuxpaint/stamps"
# Folder of the stamps → class; of two that fit the longer one holds. Drawings and toys among the photographs are left out.
STAMP_CLASSES = {
    "animals/birds": "bird",
    "animals/fish": "sea animal",
    "animals/insects": "insect",
    "animals/mammals": "mammal",
    "animals/mammals/aquatic": "sea animal",
    "animals/marsupials": "mammal",
    "animals/shellfish": "sea animal",
    "clothes": "clothing",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "hobbies/music": "musical instrument",
    "household/tools": "tool",
    "plants": "plant",
    "sports": "sport",
    "vehicles/auto": "land vehicle",
    "vehicles/cycle": "land vehicle",
    "vehicles/emergency": "land vehicle",
    "vehicles/flight": "air or water vehicle",
    "vehicles/masstransit": "land vehicle",
    "vehicles/race": "land vehicle",
    "vehicles/ship": "air or water vehicle",
}
NOT_PHOTOGRAPHS = {"cartoon", "toys", "plastic"}


def fetched(command: list[str], packages: Path, pattern: str, sha256: str) -> Path:
    """The one file of ``pattern`` in ``packages``, fetched by ``command`` unless it lies there already.

    Raises:
        RuntimeError: the command failed, or the file is not the pinned one.
    """
    if not any(packages.glob(pattern)):
        pg.run_fetch(command, packages, [pattern])
    (path,) = packages.glob(pattern)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path}: SHA-256 is {found}, expected {sha256}; remove the file and fetch again")
    return path


def photographs(packages: Path) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Tiles and classes of the photographed stamps, by their path.

    Raises:
        RuntimeError: see ``fetched``; or the archive cannot be unpacked.
    """
    name, version, sha256 = STAMPS
    command = ["apt-get", "download", f"{name}={version}"]
    package = fetched(command, packages, f"{name}_{version}_*.deb", sha256)
    folder = packages / name
    if not (folder / STAMPS_FOLDER).is_dir():
        _unpack(package, folder)
    stamps = folder / STAMPS_FOLDER
    tiles, label = {}, {}
    for path in sorted(stamps.rglob("*.png")):
        inside = path.relative_to(stamps).parent
        fitting = [place for place in STAMP_CLASSES if inside.is_relative_to(place)]
        if not fitting or NOT_PHOTOGRAPHS & set(inside.parts) or "mirror" in path.stem:
            continue
        concept = path.relative_to(stamps).with_suffix("").as_posix()
        tiles[concept], label[concept] = _tile(path), STAMP_CLASSES[max(fitting, key=len)]
    return tiles, label


def _unpack(package: Path, folder: Path) -> None:
    """Unpacked beside and renamed: a half of it, by a run that was killed or goes on beside this one, is not taken for all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        run = subprocess.run(["dpkg-deb", "-x", str(package), str(whole)], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"dpkg-deb -x {package}: {run.stderr.strip()}")
        try:
            whole.rename(folder)
        except OSError:
            if not (folder / STAMPS_FOLDER).is_dir():  # unless another run was first
                raise


def _tile(path: Path) -> Image.Image:
    """The cut-out picture on white, centred, as ``pictograms.render`` does it."""
    drawn = Image.open(path).convert("RGBA")
    drawn.thumbnail((scenes.TILE, scenes.TILE), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (scenes.TILE, scenes.TILE), "white")
    page.alpha_composite(drawn, ((scenes.TILE - drawn.width) // 2, (scenes.TILE - drawn.height) // 2))
    return page.convert("RGB")


def easy_vqa(packages: Path, count: int) -> Iterator[dict[str, Any]]:
    """``count`` samples of easy-vqa's test part, spread evenly over it: 64-pixel pictures of one coloured shape.

    Raises:
        RuntimeError: see ``fetched``.
    """
    name, version, sha256 = EASY_VQA
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"]
    wheel = fetched(command, packages, f"{name.replace('-', '_')}-{version}-*.whl", sha256)
    with zipfile.ZipFile(wheel) as archive:
        table = json.loads(archive.read("easy_vqa/data/test/questions.json"))
        for number in range(count):
            question, answer, image = table[number * len(table) // count]
            picture = Image.open(archive.open(f"easy_vqa/data/test/images/{image}.png")).convert("RGB")
            meta = {"question": question, "answers": [answer], "question_type": easy_type(answer), "style": "easy-vqa"}
            yield {"key": f"easy-vqa-{number:06d}", "image": pg.encode(picture, 90), "extension": "webp", "meta": meta}


def easy_type(answer: str) -> str:
    """What an easy-vqa question asks for, told by its answer: "yes/no", "shape" or "color"."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"
