"""The README says what the code does: its config reference, its example config, its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.config.reference import main as reference_main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)


def test_config_reference_is_current() -> None:
    assert reference_main(["--check", str(README)]) == 0


def test_example_config_is_valid() -> None:
    (example,) = blocks("yaml")
    assert parse_config(example).method.name == "digrap_update"


def test_shard_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "one.jpg").write_bytes(b"\xff\xd8not looked at here")
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "write_shards" in block)
    exec(compile(example, "README", "exec"), {})
    assert (tmp_path / "shards" / "photos-train-000000.tar").is_file()


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = set(re.findall(r"^\$ (?:digrap-scale|.*-m digrap_scale) (\w+)", README.read_text(), re.M))
    assert {"train", "evaluate", "validate", "interpolate"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
    targets = set(re.findall(r"\bmake ([\w-]+)", README.read_text()))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


# Suites are parts of configs: tests/config/test_suite_file.py.
# Comparisons are read by `compare`: tests/compare/test_load.py.
OTHERS = {*(ROOT / "configs" / "suites").iterdir(), ROOT / "configs" / "compare" / "pictograms.yaml"}
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path not in OTHERS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    parse_config(path.read_text(), path.name)
    assert yaml.safe_load(path.read_text())
