"""Which checkpoint a run goes on from: found, checked by all ranks, and named if it cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.layout import Checkpoint
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.errors import CheckpointError

NEVER, AUTO = "never", "auto"


def find_checkpoint(run_folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The folder that ``checkpoint.resume`` means, and lines about newer saves that did not end. Nothing is checked yet.

    Raises:
        CheckpointError: a path with no complete checkpoint.
    """
    if resume == NEVER:
        return None, []
    if resume != AUTO:
        path = Path(resume)
        if not layout.found_steps(path):  # not a run's folder: the checkpoint itself
            return path, []
        run_folder = path
    unfinished: list[Path] = []
    for step, folder in layout.found_steps(run_folder).items():
        if layout.is_committed(folder):
            return folder, [f"{_incomplete(path)}; resuming from step-{step}" for path in unfinished]
        unfinished.append(folder)
    if resume != AUTO:
        why = f": {_incomplete(unfinished[0])}" if unfinished else ""
        raise CheckpointError(f"checkpoint.resume: {resume} has no complete checkpoint{why}")
    return None, [f"{_incomplete(path)}; no earlier checkpoint: the run starts over" for path in unfinished]


def _incomplete(folder: Path) -> str:
    ranks = layout.missing_ranks(folder)
    which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "not committed"
    return f"{folder.name} is incomplete ({which})"


def open_together(folder: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint, every byte checked, each rank its share of the files. Collective.

    Raises:
        CheckpointError: it is damaged, or a rank does not see it; the message names the files and the newest older
            checkpoint that is whole.
    """
    try:
        return _open(folder, ranks)
    except CheckpointError as error:
        older = [path for path in _older(folder) if layout.is_committed(path)]
        raised = CheckpointError(f"{error}{_offer(older, ranks)}")
        raised.agreed = True
        raise raised from error


def _open(folder: Path, ranks: Ranks) -> Checkpoint:
    files = ranks.together(lambda: layout.listed_files(folder))[ranks.rank]
    mine = sorted(files)[ranks.rank :: ranks.size]
    problems = ranks.together(lambda: layout.check_content(folder, files, mine))
    layout.refuse_damaged(folder, [problem for part in problems for problem in part])
    return Checkpoint(folder, ranks.together(lambda: layout.read_state(folder))[ranks.rank])


def _older(folder: Path) -> Iterable[Path]:
    beside = layout.found_steps(folder.parent.parent)
    step = next((step for step, path in beside.items() if path.name == folder.name), None)
    return [path for other, path in beside.items() if step is not None and other < step]


def _offer(older: Iterable[Path], ranks: Ranks) -> str:
    for path in older:
        try:
            _open(path, ranks)
        except CheckpointError:
            continue
        return f"; {path.name} is whole: set checkpoint.resume: {path}, or remove the damaged folder"
    return "; no older checkpoint is whole: set checkpoint.resume: never and run.overwrite: true to start over"
