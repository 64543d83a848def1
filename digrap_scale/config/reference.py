"""The config reference in the README, generated from the schema.

python -m digrap_scale.config.reference --write README.md    puts it between the markers
python -m digrap_scale.config.reference --check README.md    exit 2 if what is there is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from ..errors import EXIT_OK, ConfigError
from .describe import describe, field_type, is_section, members, typed, variants
from .schema import Config, Section

BEGIN = "<!-- config reference: begin -->"
END = "<!-- config reference: end -->"


def reference_markdown() -> str:
    """A heading and a table for each section, each method, and each list of sections, in the schema's order."""
    parts = []
    for name, field in Config.model_fields.items():
        choices = variants(field.annotation)
        if choices:
            parts.append(f"### `{name}`\n\nOne of the following; `{name}.name` tells which.")
            parts += [_table(f"`{name}.name: {choice}`", member, 4) for choice, member in choices.items()]
            continue
        for path, section in _sections(name, field):
            parts.append(_table(f"`{path}`", section, 3 if path == name else 4))
    return "\n\n".join(parts) + "\n"


def embed(text: str, source: str) -> str:
    """``text`` with the reference between its two markers.

    Raises:
        ConfigError: the markers are not there exactly once, in order. ``source`` names the text.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"{source}: expected one line `{BEGIN}` and below it one line `{END}`, found them otherwise")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n\n{reference_markdown()}\n{END}{tail}"


def _sections(path: str, field: FieldInfo) -> Iterator[tuple[str, type[Section]]]:
    """The section of a field and those inside it; a list's is called ``path.N``, N its index in overrides."""
    for member in members(field.annotation):
        inner: Any = typed(member)[0]
        if get_origin(inner) is list:
            inner = typed(get_args(inner)[0])[0]
            path = f"{path}.N"
        if is_section(inner):
            yield path, inner
            for name, child in inner.model_fields.items():
                yield from _sections(f"{path}.{name}", child)


def _table(title: str, section: type[Section], level: int) -> str:
    rows = ["| key | type | default | description |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if title.endswith(f": {field.default}`") and name == "name":
            continue  # a method's own name is in the title
        annotation, metadata = field_type(field)
        kind = describe(annotation, metadata).removeprefix("a ")
        cells = (f"`{name}`", kind, _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    body = "\n".join(rows) if len(rows) > 2 else "No further keys."
    return f"{'#' * level} {title}\n\n{' '.join((section.__doc__ or '').split())}\n\n{body}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m digrap_scale.config.reference", description="Config reference.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", metavar="FILE", type=Path, help="put the reference between FILE's markers")
    action.add_argument("--check", metavar="FILE", type=Path, help="fail if FILE's reference is not up to date")
    options = parser.parse_args(arguments)
    file: Path | None = options.write or options.check
    if file is None:
        print(reference_markdown(), end="")
        return EXIT_OK
    try:
        text = _read(file)
        fresh = embed(text, str(file))
        if options.check and fresh != text:
            remedy = f"python -m digrap_scale.config.reference --write {file}"
            raise ConfigError(f"{file}: expected the schema's config reference, found another; run `{remedy}`")
        if options.write and fresh != text:
            file.write_text(fresh, encoding="utf-8")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected a readable text file, found: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
