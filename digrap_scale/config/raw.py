"""The config before validation: plain values, where each one was written, and the problems so far."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from . import strict_yaml
from .rules import Path

MAX_BYTES = 4 * strict_yaml.MAX_CHARACTERS
MAX_PROBLEMS = 50
MAX_SHOWN = 80  # characters of a value or an override in a message


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of the config (or of another ``file``), or an override (its index, its text)."""

    line: int
    override: str | None = None
    file: str | None = None


@dataclass
class Raw:
    """The config before validation: plain values, where each was written, and the problems so far."""

    source: str
    data: dict[str, Any]
    origins: dict[Path, Origin] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)
    refused: set[Path] = field(default_factory=set)
    problems: list[tuple[Origin, str]] = field(default_factory=list)

    def take(self, document: strict_yaml.Document, at: Path, override: Origin | None, file: str | None = None) -> None:
        """Note where the values of ``document``, now at path ``at``, were written; forget what was there before."""
        for table in (self.origins, self.texts):
            for path in [path for path in table if path[: len(at)] == at]:
                del table[path]
        self.refused = {path for path in self.refused if path[: len(at)] != at}
        self.origins |= {at + path: override or Origin(line, file=file) for path, line in document.lines.items()}
        self.texts |= {at + path: text for path, text in document.texts.items()}
        self.refused |= {at + path for path in document.refused}
        for line, path, message in document.problems:
            self.problems.append((override or Origin(line, file=file), f"{dotted(at + path)}: {message}"))

    def complain(self, path: Path, message: str) -> None:
        """Add a problem, at the place where ``path``, or else what should hold it, was written."""
        origin = next(
            (self.origins[path[:length]] for length in range(len(path), -1, -1) if path[:length] in self.origins),
            Origin(1),
        )
        self.problems.append((origin, message))

    def report(self) -> list[str]:
        """Lines of all problems: the config's in its order, then other files', then the overrides' in theirs."""

        def order(problem: tuple[Origin, str]) -> tuple[bool, str, int]:
            return problem[0].override is not None, problem[0].file or "", problem[0].line

        ordered = sorted(self.problems, key=order)
        lines = []
        for origin, message in ordered:
            place = f"{origin.file or self.source}:{origin.line}"
            if origin.override is not None:
                place = f"override `{one_line(origin.override, MAX_SHOWN)}`"
            lines.append(f"{place}: {one_line(message)}")
        lines = list(dict.fromkeys(lines))
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"{self.source}: … and {len(lines) - MAX_PROBLEMS} more problems"]
        return lines


def dotted(path: Path) -> str:
    """``path`` as messages name it."""
    return ".".join(str(part) for part in path) or "config"


def one_line(text: str, limit: int | None = None) -> str:
    """``text`` fit for one line of a message: control characters escaped, cut after ``limit`` characters."""
    cut = text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
        for character in cut
    )


def read_text(path: str | os.PathLike[str], name: str) -> str:
    """The text of a UTF-8 file that ``name`` stands for in messages. Raises: ConfigError, one line."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a folder, or a pipe that nobody may ever write to
            raise ConfigError(
                f"{name}: expected a config file, found a {'folder' if os.path.isdir(path) else 'device'}"
            )
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: expected a config file, found no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{name}: expected a readable config file, found: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name}: expected a config of at most {MAX_BYTES} bytes, found a larger file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: expected UTF-8 text, found the byte {content[error.start]:#04x}") from None
