"""Files of lines that only grow, whatever happens to the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from digrap_scale.checkpoint.atomic import save_error, write_file
from digrap_scale.evaluation.strength import read_lines


class Appender:
    """A file that only grows: each call adds whole lines, handed to the system at once. Raises: SaveError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = self._guard(self._open)

    def _open(self) -> IO[bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.open("ab", buffering=0)

    def append(self, lines: str) -> None:
        def write() -> None:
            left = memoryview(lines.encode())
            while left:  # unbuffered: nothing is left to fail at closing, but a write may be partial
                left = left[self._file.write(left) :]

        self._guard(write)

    def close(self) -> None:
        self._guard(self._file.close)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise save_error(self._path, error) from error


def trim(path: Path, last_step: int) -> None:
    """Takes out a JSON-lines file's torn last line and its rows of steps after ``last_step``; other lines stay.

    Raises:
        ConfigError: a whole line is not a JSON object.
        SaveError: the file cannot be written.
    """
    if not path.is_file():
        return
    kept = [json.dumps(line, ensure_ascii=False) for _, line in read_lines(path) if line.get("step", 0) <= last_step]
    write_file(path, "".join(line + "\n" for line in kept) if last_step else "")
