"""How a run ended, or that it goes on: ``status.json`` in its folder."""

from __future__ import annotations

import json
import signal
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.errors import DigrapError, Preempted

STATUS_FILE = "status.json"
DONE = "done"
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 128 + signal.SIGTERM

State = Literal["running", "done", "failed", "preempted"]


def write_status(
    folder: Path,
    state: State,
    exit_code: int | None,
    reason: str,
    *,
    step: int,
    total_steps: int | None,
    started: str,
) -> None:
    """Raises: SaveError."""
    status = {
        "state": state,
        "exit_code": exit_code,
        "reason": reason,
        "step": step,
        "total_steps": total_steps,
        "started": started,
        "ended": None if state == "running" else now(),
    }
    write_file(folder / STATUS_FILE, json.dumps(status, indent=2, ensure_ascii=False) + "\n")


def read_status(folder: str | Path) -> dict[str, Any] | None:
    """A run's ``status.json``, or None before its first start."""
    path = Path(folder) / STATUS_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def outcome_of(error: BaseException | None) -> tuple[State, int, str]:
    """State, exit code and reason of a run that ended so."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else _EXIT_FAILED if error.code else 0
        if code:
            terminated = "ended by SIGTERM outside of training"
            return "failed", code, terminated if code == EXIT_TERMINATED else f"exit code {code}"
        error = None
    if error is None:
        return "done", 0, ""
    if isinstance(error, KeyboardInterrupt):
        return "failed", _EXIT_INTERRUPTED, "interrupted from the keyboard"
    if isinstance(error, DigrapError):
        state: State = "preempted" if isinstance(error, Preempted) else "failed"
        return state, error.exit_code, one_line(str(error))
    return "failed", _EXIT_FAILED, one_line(f"{type(error).__name__}: {error}")


def one_line(text: str, limit: int = 2000) -> str:
    """Of several lines."""
    return " · ".join(part.strip() for part in text.splitlines() if part.strip())[:limit]


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
