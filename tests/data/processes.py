"""What Linux says of a process, for the data room's tests."""

from __future__ import annotations

from pathlib import Path


def status_of(process: int | None, key: str) -> str:
    """The first word of a line of its status. Raises: OSError: there is no such process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{key}:")).split()[1]


def lives(process: int) -> bool:
    """A process that has ended but that nobody waits for is in state Z."""
    try:
        return status_of(process, "State") != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
