"""A suite in a file of its own: merged, dumped whole, and its mistakes named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from digrap_scale.config import Config, dump_config, parse_config
from digrap_scale.errors import ConfigError

from .base import BASE, problems

SUITE = """
suite:
  - {name: val, shards: [val.tar], shift: id}
  - name: rephrasings
    shards: [rephrasings-*.tar]
    shift: near
    modality: question
"""
INLINE = """
evaluation:
  suite:
    - {name: own, shards: [own.tar], shift: far, modality: other}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    return file


def test_the_file_follows_what_the_config_lists(suite: Path) -> None:
    config = parse_config(BASE + INLINE + f"  suite_file: {suite}\n")
    found = [(entry.name, entry.shift, entry.modality) for entry in config.evaluation.suite]
    assert found == [("own", "far", "other"), ("val", "id", "none"), ("rephrasings", "near", "question")]
    assert config.evaluation.suite_file is None
    suite.unlink()
    assert parse_config(dump_config(config)) == config, "the resolved config needs no file"


def test_given_on_the_command_line(suite: Path) -> None:
    config = parse_config(BASE, overrides=[f"evaluation.suite_file={suite}", "evaluation.batch_samples=3"])
    assert [entry.name for entry in config.evaluation.suite] == ["val", "rephrasings"]


def test_problems_name_the_file_and_its_line(suite: Path) -> None:
    suite.write_text(SUITE.replace("modality: question", "modality: questions").replace("shift: id", "shft: id"))
    found = problems(BASE + INLINE, f"evaluation.suite_file={suite}", "run.seed=-1")
    assert found[0].startswith(f"{suite}:3: unknown key `evaluation.suite.1.shft`; did you mean `shift`?")
    assert found[1].startswith(f"{suite}:7: evaluation.suite.2.modality: expected `none`, `vision`")
    assert "did you mean `question`?" in found[1]
    assert "run.seed" in found[2] and len(found) == 3


def test_names_are_unique_over_both(suite: Path) -> None:
    found = problems(BASE + INLINE.replace("own,", "val,"), f"evaluation.suite_file={suite}")
    assert found == [
        f"{suite}:3: evaluation.suite.1.name: expected a name of its own, found 'val' again (first: evaluation.suite.0)"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a suite file with the key `suite` and a list of test sets, found none"),
        ("suite: []", "a list of test sets, found none"),
        ("suite: {name: a}", "a list of test sets, found none"),
        ("suit: []", "unknown key `suit` in a suite file; did you mean `suite`?"),
        (SUITE + "batch_samples: 3", "unknown key `batch_samples` in a suite file; known: suite"),
        ("suite: [*a]", ":1: expected plain YAML, found an alias"),
        (SUITE + SUITE, "expected it once, found it twice"),
    ],
)
def test_files_that_are_no_suite(suite: Path, text: str, message: str) -> None:
    suite.write_text(text)
    found = problems(BASE + f"evaluation:\n  suite_file: {suite}\n")
    assert len(found) == 1 and "evaluation.suite_file: " in found[0] and str(suite) in found[0]
    assert message in found[0]


def test_missing_file(tmp_path: Path) -> None:
    found = problems(BASE, f"evaluation.suite_file={tmp_path}/none.yaml")
    assert len(found) == 1 and "none.yaml: expected a config file, found no such file" in found[0]


@pytest.mark.parametrize(("value", "words"), [("3", "expected text or null"), ("", None), ("''", "expected text")])
def test_values_of_another_kind(value: str, words: str | None) -> None:
    if words is None:
        assert parse_config(BASE, overrides=[f"evaluation.suite_file={value}"]).evaluation.suite == []
        return
    assert words in problems(BASE, f"evaluation.suite_file={value}")[0]


def test_a_config_built_in_python_cannot_leave_the_file_unread() -> None:
    values = parse_config(BASE).model_dump() | {"evaluation": {"suite_file": "suite.yaml"}}
    with pytest.raises(ValueError, match="load it with load_config"):
        Config.model_validate(values)


@pytest.mark.parametrize("file", sorted(Path("configs/suites").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_suites(file: Path) -> None:
    suite = parse_config(BASE, overrides=[f"evaluation.suite_file={file}"]).evaluation.suite
    assert suite[0].shift == "id" and len(suite) > 3


def test_a_suite_that_is_no_list_is_the_schemas_problem(suite: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation.suite: expected a list"):
        parse_config(BASE, overrides=[f"evaluation.suite_file={suite}", "evaluation.suite=3"])
