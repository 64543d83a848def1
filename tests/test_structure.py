"""The house keeps its shape: imports run one way, and what knows of processes stays in its rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "digrap_scale"
NAME = PACKAGE.name

ROOMS = ("method", "sharding", "reference", "data", "models", "checkpoint", "evaluation")
# What each part may import of ours, itself aside.
BASE = {"types", "errors", "environ", "safetensors_file", "file_names", "process_lock"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "environ": set(),
    "safetensors_file": {"errors"},
    "file_names": {"errors"},
    "process_lock": set(),
    "version": set(),
    "config": {"errors"},
    **{room: BASE | {"config"} for room in ROOMS},
    "planning": BASE | {"checkpoint", "config", "data", "method", "models", "reference", "sharding"},
    "projector": BASE | {"config", "method", "sharding", "reference"},
    "integrations": BASE | {"config", "projector", "checkpoint", "sharding"},
    "training": BASE | {"config", "planning", "projector", "version", *ROOMS},
    "demo": BASE | {"config", "projector", "training", *ROOMS},
    "compare": BASE | {"config", "training", "version", "data", "evaluation", "checkpoint"},
    "cli": BASE | {"config", "planning", "projector", "training", "demo", "compare", "version", *ROOMS},
    "__init__": BASE | {"projector", "version"},
    "__main__": {"cli"},
}
# Where processes are known of. Rank and world size reach the data room as arguments.
DISTRIBUTED = ("sharding/", "checkpoint/", "training/setup.py")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names that ``path`` imports anywhere, relative imports resolved; ``from a import b`` gives ``a.b``."""
    package = [NAME, *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return names


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part}: a part that the house does not know; add it to the drawing first"
    parts = {name.split(".")[1] for name in imported(path) if name.startswith(NAME + ".")}
    assert parts - {part} <= ALLOWED[part], f"{path}: imports {sorted(parts - {part} - ALLOWED[part])}"
    if part not in ("__init__", "__main__", "cli"):
        assert NAME not in imported(path), f"{path}: imports the whole package"


def test_processes_are_known_in_few_places() -> None:
    offenders = [
        str(path.relative_to(PACKAGE))
        for path in sources()
        if not str(path.relative_to(PACKAGE)).startswith(DISTRIBUTED)
        and any(under(name, "torch.distributed", "deepspeed") for name in imported(path))
    ]
    assert offenders == []


def test_method_is_plain_tensor_math() -> None:
    for path in sorted((PACKAGE / "method").glob("*.py")):
        foreign = {
            n for n in imported(path) if under(n, "torch.distributed", "deepspeed", "transformers", "safetensors")
        }
        assert not foreign, f"{path}: {foreign}"


def test_files_are_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_check_sees_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to import is seen."""
    monkeypatch.setattr("tests.test_structure.PACKAGE", tmp_path / NAME)
    path = tmp_path / NAME / "method" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.distributed.fsdp as fsdp\nfrom ..sharding import base\nfrom torch import distributed\n"
        "def late():\n    from digrap_scale.models.build import build_model\n"
    )
    assert imported(path) == {
        "torch.distributed.fsdp",
        "torch.distributed",
        f"{NAME}.sharding.base",
        f"{NAME}.models.build.build_model",
    }
