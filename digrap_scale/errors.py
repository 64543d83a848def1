"""Errors that a user can mend, and the exit code of each: one line for the message, one number for the shell."""

from __future__ import annotations

import os
import re
import sys

EXIT_OK = 0
EXIT_PREEMPTED = 75


class DigrapError(Exception):
    """Base of the errors that end a run with one line.

    Attributes:
        exit_code: the process's exit status.
        agreed: every rank raises it, so that one of them telling is enough.
    """

    exit_code = 1
    agreed = False


class ConfigError(DigrapError):
    """The config, the data or a combination of options is wrong (exit 2).

    Args:
        problems: one line each; all of them are shown, so that a user mends them in one go.
    """

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(DigrapError):
    """A checkpoint or a reference cannot be used (exit 3)."""

    exit_code = 3


class SaveError(DigrapError):
    """Results could not be written (exit 4)."""

    exit_code = 4


class PeerError(DigrapError):
    """Another process failed or hung (exit 5)."""

    exit_code = 5


class Preempted(DigrapError):
    """The run was asked to stop, and saved its state before it did (exit 75): not an error, but the end of this process."""

    exit_code = EXIT_PREEMPTED
    agreed = True


class NonFiniteError(DigrapError):
    """Too many steps in a row had a gradient that is not finite (exit 1): the run has diverged."""

    exit_code = 1


class TrialError(DigrapError):
    """Some trials of a comparison failed; the others are in its report (exit 1)."""

    exit_code = 1


def complain(error: DigrapError) -> None:
    """Rank 0 tells what all ranks see (a bad config); what happens to one rank is told by that rank."""
    rank = int(os.environ.get("RANK", "0"))
    if error.agreed and rank != 0:
        return
    prefix = f"rank {rank}: " if rank != 0 else ""
    # A launcher's own exit status is 1, whatever ours was.
    suffix = f" (exit {error.exit_code})" if "WORLD_SIZE" in os.environ else ""
    *lines, last = str(error).splitlines()
    for line in [*lines, last + suffix]:
        print(f"{prefix}{line}", file=sys.stderr)


def brief(error: BaseException) -> str:
    """A library's error in one short line: gloo puts its own source file first, and advice and a C++ trace after."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] ", "", lines[0]).split(". ")[0]
