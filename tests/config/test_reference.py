"""The generated reference names every key, and the command keeps a file up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from digrap_scale.config import Config
from digrap_scale.config.describe import members, typed
from digrap_scale.config.reference import BEGIN, END, main, reference_markdown


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Every section that can be reached from ``annotation``."""
    annotation = typed(annotation)[0]
    if isinstance(annotation, type):
        if not issubclass(annotation, BaseModel):
            return []
        return [
            annotation,
            *(found for field in annotation.model_fields.values() for found in sections(field.annotation)),
        ]
    return [found for member in getattr(annotation, "__args__", ()) for found in sections(member)]


def test_every_key_has_a_row_and_a_description() -> None:
    text = reference_markdown()
    found = sections(Config)
    assert len(found) > 17
    for section in found[1:]:
        assert " ".join((section.__doc__ or "").split()) in text
        for name, field in section.model_fields.items():
            if section is not Config and field.description is not None:
                assert f"| `{name}` | " in text
                assert field.description.replace("|", "\\|") in text
            else:
                assert is_method_name(section, name, field), f"{section.__name__}.{name} has no description"


def is_method_name(section: type[BaseModel], name: str, field: Any) -> bool:
    return name == "name" and f"#### `method.name: {field.default}`" in reference_markdown()


def test_all_methods_and_all_rows_are_well_formed() -> None:
    text = reference_markdown()
    for member in members(Config.model_fields["method"].annotation):
        assert f"#### `method.name: {member.model_fields['name'].default}`" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line
    assert "| `learning_rate` | number > 0 | required | Peak learning rate. |" in text
    assert "#### `evaluation.suite.N`" in text
    assert "#### `model.lora`" in text


def test_write_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    assert main(["--check", str(file)]) == 2
    assert "--write" in capsys.readouterr().err
    assert main(["--write", str(file)]) == 0
    assert main(["--check", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n### `run`")
    assert text.endswith(f"{END}\n\nafter\n")
    assert main(["--write", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_file_without_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    assert main(["--write", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"{file}: expected one line `{BEGIN}`")
    assert file.read_text() == text
    assert main(["--check", str(tmp_path / "none.md")]) == 2
