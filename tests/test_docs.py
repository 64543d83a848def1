"""The site says what the code does: YAML is valid, commands and flags exist, Python runs, pictures are current."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from digrap_scale import errors
from digrap_scale.cli import _parse, main
from digrap_scale.compare.load import load_grid
from digrap_scale.config import strict_yaml
from digrap_scale.config.load import parse_config
from digrap_scale.errors import ConfigError, DigrapError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMPLETE = {"method": {"name": "none"}, "run": {"folder": "r"}, "training": {"steps": 1, "global_batch_samples": 8}}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file's name.
        language: after the fence.
        text: what is in it.
        run: None; or what a `<!-- run … -->` above it says: "" (its commands), or the file that it is to be written to.
        foreign: the other tool that a `<!-- of NAME -->` above says it belongs to.
    """

    page: str
    language: str
    text: str
    run: str | None
    foreign: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:50]}"


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def blocks_of(page: Path) -> Iterator[Block]:
    fence = re.compile(r"(?:<!-- (run|of)(?::? ([^>]*?))? -->\n\s*)?^( *)```(\w+)[^\n]*\n(.*?)^ *```$", re.S | re.M)
    for kind, argument, indent, language, text in fence.findall(page.read_text(encoding="utf-8")):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        run = argument if kind == "run" else None
        yield Block(page.name, language, "\n".join(lines) + "\n", run, argument if kind == "of" else None)


def commands(block: Block) -> list[list[str]]:
    """Words of each command of a console block, without variables before and comments after it."""
    lines = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    for words in found:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
    return [words for words in found if words]


OURS = [block for block in blocks("yaml") if block.foreign is None]


@pytest.mark.parametrize("block", OURS, ids=str)
def test_yaml_is_valid(block: Block, tmp_path: Path) -> None:
    """Whole configs (and comparisons) as they are; parts of one in a config that has the rest."""
    values: dict[str, Any] = strict_yaml.read(block.text).data
    if {"methods", "executor"} & values.keys():
        grid = {
            "out": "o",
            "base": "b.yaml",
            "seeds": [0],
            "budget": 1,
            "methods": {"FT": {"method": {"name": "none"}}},
        }
        (tmp_path / "grid.yaml").write_text(strict_yaml.dump({**grid, **values}))
        load_grid(str(tmp_path / "grid.yaml"))
        return
    text = block.text
    if "run" not in values:
        task = values.get("model", {}).get("task", "contrastive")
        rest: dict[str, Any] = {
            **COMPLETE,
            "model": {"path": "m", "task": task},
            "data": {"train": ["t.tar"], "classes": None if task == "vqa" else "c.json"},
            "optimizer": {"learning_rate": 1e-3},
        }
        if "reference" in values:
            rest["method"] = {"name": "digrap"}
        whole = {**rest, **values}
        for section in ("data", "training", "model", "optimizer"):
            whole[section] = {**rest[section], **values.get(section, {})}
        if "evaluation" in values and not {"suite", "suite_file"} & values["evaluation"].keys():
            whole["evaluation"] = {"suite": [{"name": "s", "shards": ["s.tar"], "shift": "id"}], **values["evaluation"]}
        if "sources" in whole["data"]:
            del whole["data"]["train"]
        text = strict_yaml.dump(whole)
    parse_config(text, block.page)


def our_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of what is ours, in fenced and indented blocks alike; launchers' own options are cut off."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [words for block in blocks_of(page) if block.language in ("console", "sh") for words in commands(block)]
        for line in re.findall(r"^    (?:\$ )?((?:digrap-scale|python tools/\S+) .*)$", text, re.M):
            lines.append(shlex.split(line, comments=True))
        found += [(page.name, words) for words in lines]
    return found


def test_every_command_has_these_verbs_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """The parser itself takes each `digrap-scale …`; each option of a tool is in its help."""
    seen: set[str] = set()
    helps: dict[str, str] = {}
    for page, words in our_commands():
        line = f"{page}: {' '.join(words)}"
        if words[0] == "digrap-scale" or "digrap_scale" in words:
            start = words.index("digrap_scale") if "digrap_scale" in words else 0
            arguments = [word for word in words[start + 1 :] if word != "…"]
            if "[--" in line or "VERB" in arguments:
                continue  # a synopsis, not a command
            seen.add(arguments[0])
            try:
                _parse(arguments)
            except SystemExit as stop:
                assert stop.code == 0, f"{line}: {capsys.readouterr().err}"
        elif words[0] == "python" and words[1].startswith("tools/"):
            assert (ROOT / words[1]).is_file(), line
            tool = words[1]
            if tool not in helps:
                with pytest.raises(SystemExit), redirect_stdout(StringIO()) as shown:
                    runpy.run_path(str(ROOT / tool), run_name="tool")["main"](["--help"])
                helps[tool] = shown.getvalue()
            unknown = [word for word in words[2:] if word.startswith("--") and f"{word} " not in helps[tool] + " "]
            assert not unknown, f"{line}: {unknown}"
        elif (name := words[0]).startswith("launch/") or (name := words[-2] if len(words) > 1 else "").startswith(
            "launch/"
        ):
            assert (ROOT / name).is_file(), line
    assert {"train", "evaluate", "validate", "convert", "diff", "interpolate", "index"} <= seen


def test_a_wrong_flag_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ torchrun -m digrap_scale convert a b --too zero\n```\n")
    monkeypatch.setattr("tests.test_docs.PAGES", [page])
    assert our_commands() == [("page.md", ["torchrun", "-m", "digrap_scale", "convert", "a", "b", "--too", "zero"])]
    with pytest.raises(SystemExit), redirect_stderr(StringIO()):
        _parse(["convert", "a", "b", "--too", "zero"])


SELF_CONTAINED = [
    block
    for block in blocks("python")
    if block.run is None and block.foreign is None and block.page not in ("README.md",) and "import " in block.text
]


@pytest.mark.parametrize("block", SELF_CONTAINED, ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's own are run by test_readme.py, those with a `run` above them by the walk below."""
    (tmp_path / "digrap_scale").symlink_to(ROOT / "digrap_scale")  # pages name files of the checkout
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(StringIO()):
        exec(compile(block.text, block.page, "exec"), {"__name__": "page"})


def test_troubleshooting_knows_every_error() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DigrapError)]
    for kind in kinds:
        if kind is not DigrapError:
            assert re.search(rf"^\| {kind.exit_code} \| `{kind.__name__}` \|", text, re.M), (
                f"{kind.__name__} is not told of"
            )
    codes = {kind.exit_code for kind in kinds} | {errors.EXIT_OK, errors.EXIT_PREEMPTED}
    assert all(re.search(rf"^\| {code} \|", text, re.M) for code in codes)


def test_troubleshooting_quotes_real_messages() -> None:
    """What stands first in a row, in backticks, is in the package's source (line breaks of its strings aside)."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "digrap_scale").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source).replace("{backend}", "single")
    rows = re.findall(r"^\| (`[^|]*) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    assert [text for text in quoted if text not in source] == []


def test_pictures_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    if tested is None or matplotlib.__version__ != tested[1]:
        pytest.skip(
            f"matplotlib {matplotlib.__version__} may draw the same with other bytes; constraints.txt has the tested one"
        )
    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    import draw

    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    with redirect_stdout(StringIO()):
        draw.main()
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written and written == {path.name: path.read_bytes() for path in (DOCS / "figures").glob("*.svg")}


def test_the_evidence_shows_the_study_s_own_picture() -> None:
    """The site cannot reach beyond docs/: a copy."""
    own = ROOT / "benchmarks" / "robustness" / "results" / "pictograms" / "rates.png"
    assert (DOCS / "figures" / "rates.png").read_bytes() == own.read_bytes()


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs itself checks links and anchors (`make docs`); this is the part that needs no mkdocs."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^#\n]*?: (\w+\.md)$", text, re.M)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_quick_start_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    """As a newcomer would: a fresh folder, every block in its turn."""
    environment = walk_environment()
    for block in blocks_of(DOCS / "quickstart.md"):
        if block.run is None:
            continue
        if block.language == "console":
            for line in re.findall(r"^\$ (.*)$", block.text, re.M):
                line = line.replace("python tools/", f"python {ROOT}/tools/")
                done = subprocess.run(
                    ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            continue
        (tmp_path / block.run).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            done = subprocess.run(
                ["python", block.run], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
            )
            assert done.returncode == 0, f"{block.run}\n{done.stderr}"
    assert "LABEL_" not in done.stdout and "→" in done.stdout  # the last block names a class
    assert (tmp_path / "runs/first/results.md").is_file() and (tmp_path / "runs/sharded/final").is_dir()


def walk_environment() -> dict[str, str]:
    """This interpreter's programs first on the path; the package importable from anywhere."""
    import os

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_wrong_key_is_seen() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        parse_config("run: {foldr: r}\n", "page.md")
    assert main(["validate", "/nowhere.yaml"]) == ConfigError.exit_code
