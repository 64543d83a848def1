"""What a run writes while it trains: metrics, ω per layer, progress on the screen, and how it ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from digrap_scale.checkpoint.atomic import save_error
from digrap_scale.errors import PeerError, SaveError
from digrap_scale.evaluation.layers import LAYERS_FILE, encode_layers
from digrap_scale.evaluation.strength import STRENGTH_FILE, encode_names, encode_row, read_lines, read_strength
from digrap_scale.projector.layers import LayerSnapshot
from digrap_scale.training.appender import Appender, trim
from digrap_scale.training.status import STATUS_FILE, State, now, one_line, outcome_of, read_status, write_status
from digrap_scale.training.trackers import Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["METRICS", "METRICS_FILE", "STATUS_FILE", "RunLog", "read_metrics", "read_status", "read_strength", "trim"]

METRICS = ("step", "loss", "learning_rate", "grad_norm", "strength_mean", "conflict_rate", "samples_per_second")
METRICS_FILE = "metrics.jsonl"
MESSAGES_FILE = "messages.log"
_STATUS_PERIOD_S = 10.0


class RunLog:
    """The log of one run, on every rank; only rank 0 shows and writes anything.

    Use as a context manager: it writes ``status.json`` ("running" on entry; "done", "failed" or "preempted" on exit,
    with the exit code and a one-line reason). Nothing is kept in memory from step to step.

        with RunLog(folder, rank=rank, total_steps=1000, ...) as log:
            for step in range(1, 1001):
                ...
                log.advance(step, samples=global_batch_samples)
                if log.due(step):             # the same answer on every rank: collectives for the loss go inside
                    log.metrics(step, loss=..., learning_rate=..., grad_norm=..., strength_mean=..., conflict_rate=...)
                if log.strength_due(step):
                    log.strength(step, projector.strength())

    Args:
        folder: the run's folder.
        rank: this process's rank.
        total_steps: optimizer steps of the whole run.
        tensorboard: also write ``tensorboard/``.
        every_steps: steps between two lines of ``metrics.jsonl``; the first and the last step always have one.
        strength_every_steps: steps between two snapshots of ω; the first and the last step always have one.
        layers_every_steps: steps between two snapshots of conflicts and drift, and at the last step; None: none.
        start_step: steps done before (a resumed run). Lines of later steps, left by the interrupted run, are removed.
        console: where to show progress; standard error if None.

    Attributes:
        trackers: who else gets the metrics.

    Raises:
        SaveError: a file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int,
        total_steps: int,
        tensorboard: bool,
        every_steps: int,
        strength_every_steps: int,
        layers_every_steps: int | None = None,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.trackers: Trackers | None = None
        self._writes = rank == 0
        self._total_steps, self._start_step, self._step = total_steps, start_step, start_step
        self._every_steps, self._strength_every_steps = every_steps, strength_every_steps
        self._layers_every_steps = layers_every_steps
        self._use_tensorboard = tensorboard
        self._console = console or Console(stderr=True)
        self._metrics: Appender | None = None
        self._strength: Appender | None = None
        self._layers: Appender | None = None
        self._names: list[str] = []
        self._board: SummaryWriter | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._started = now()
        self._status_clock = self._line_clock = time.monotonic()
        self._samples = self._skipped = 0

    def __enter__(self) -> RunLog:
        if not self._writes:
            return self
        try:
            self._write_status("running")
            trim(self.folder / METRICS_FILE, self._start_step)
            trim(self.folder / STRENGTH_FILE, self._start_step)
            trim(self.folder / LAYERS_FILE, self._start_step)
            self._metrics = Appender(self.folder / METRICS_FILE)
            if self._use_tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import: only runs that want it pay

                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._start_step + 1)
        except OSError as error:
            raise save_error(self.folder, error) from error
        if self._console.is_terminal:
            self._progress = _progress(self._console)
            self._task = self._progress.add_task("train", total=self._total_steps, completed=self._start_step, shown="")
            self._progress.start()
        self._line_clock = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        if self._progress is not None:
            self._progress.stop()
        # one after the other, whatever fails: a full disk must not keep the status from saying so
        failures = [
            failure
            for close in (self._metrics, self._strength, self._layers, self._board)
            if close is not None and (failure := self._try(close.close)) is not None
        ]
        outcome = outcome_of(error or (failures[0] if failures else None))
        failure = self._try(lambda: self._write_status(*outcome))
        failures += [failure] if failure is not None else []
        if failures and error is None:
            raise failures[0]
        for failure in failures:  # the first error is what the user must read; it goes on from here
            self._print(f"also, the log could not be closed: {failure}")

    def _try(self, action: Callable[[], object]) -> SaveError | None:
        try:
            action()
        except SaveError as error:
            return error
        except OSError as error:
            return save_error(self.folder, error)
        return None

    def due(self, step: int) -> bool:
        """Whether ``step`` (1 is the first) gets a line of metrics; the same on every rank."""
        return step % self._every_steps == 0 or step in (self._start_step + 1, self._total_steps)

    def strength_due(self, step: int) -> bool:
        """Whether ``step`` gets a snapshot of ω; the same on every rank."""
        return step % self._strength_every_steps == 0 or step in (self._start_step + 1, self._total_steps)

    def layers_due(self, step: int) -> bool:
        """Whether ``step`` gets a snapshot of conflicts and drift; the same on every rank."""
        every = self._layers_every_steps
        return every is not None and (step % every == 0 or step == self._total_steps)

    def advance(self, step: int, *, samples: int, skipped: bool = False) -> None:
        """Counts a finished step.

        Args:
            step: optimizer steps done, this one included.
            samples: samples of the step, over all ranks.
            skipped: the step changed nothing, its gradient was not finite.
        """
        self._step = step
        self._samples += samples
        self._skipped += skipped
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        strength_mean: float,
        conflict_rate: float,
        counters: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a line of metrics and shows it.

        Besides the arguments the line has ``samples_per_second`` and ``skipped`` (skipped steps), both since the line
        before. Values that are not finite are written as null: NaN is not JSON.

        Args:
            step: optimizer steps done.
            loss: mean over the global batch, averaged over ranks by the caller.
            learning_rate: of this step.
            grad_norm: global L2 norm before clipping.
            strength_mean: mean ω over layers; 0 without a method.
            conflict_rate: share of layers in conflict, in [0, 1].
            counters: more of the line, such as samples of each source.
        """
        if not self._writes or self._metrics is None:
            return
        moment = time.monotonic()
        values = (
            step,
            loss,
            learning_rate,
            grad_norm,
            strength_mean,
            conflict_rate,
            self._samples / max(moment - self._line_clock, 1e-9),
        )
        row: dict[str, Any] = {name: _finite(value) for name, value in zip(METRICS, values, strict=True)}
        row["skipped"] = self._skipped
        row.update(counters or {})
        self._line_clock, self._samples, self._skipped = moment, 0, 0
        self._metrics.append(json.dumps(row) + "\n")
        numbers = {f"train/{name}": value for name, value in _numbers(row).items() if name != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self.trackers is not None:
            self.trackers.log(step, numbers, self.message)
        shown = f"loss {loss:.4g} · ω {strength_mean:.3f} · {row['samples_per_second']:.0f} samples/s"
        if self._progress is not None:
            self._progress.update(self._task, shown=shown)
        else:
            self._print(
                f"step {step}/{self._total_steps} · {shown} · lr {learning_rate:.3g} · conflicts {conflict_rate:.0%}"
            )
        if moment - self._status_clock >= _STATUS_PERIOD_S:
            self._write_status("running")

    def strength(self, step: int, strength: Mapping[str, float]) -> None:
        """Appends a snapshot of ω: layer name → ω in [0, 1]. Nothing is written for no layers."""
        if not self._writes or not strength:
            return
        lines = ""
        if self._strength is None:
            self._strength = Appender(self.folder / STRENGTH_FILE)
        if list(strength) != self._names:
            self._names = list(strength)
            lines = encode_names(self._names)
        self._strength.append(lines + encode_row(step, [float(value) for value in strength.values()]))
        if self._board is not None:
            self._board.add_histogram("layers/strength", torch.tensor(list(strength.values())), step)

    def layers(self, step: int, snapshot: LayerSnapshot | None) -> None:
        """Appends a snapshot of conflicts and drift. Nothing is written for no layers."""
        if not self._writes or snapshot is None:
            return
        lines = ""
        if self._layers is None:
            self._layers = Appender(self.folder / LAYERS_FILE)
            lines = encode_names(snapshot.names)
        self._layers.append(lines + encode_layers(step, snapshot.steps, snapshot.conflict_rate, snapshot.drift))
        if self._board is not None:
            for name, values in (("conflict_rate", snapshot.conflict_rate), ("drift", snapshot.drift)):
                self._board.add_histogram(f"layers/{name}", torch.tensor(values), step)

    def message(self, text: str) -> None:
        """Shows a line above the progress bar and keeps it, with its time and step, in ``messages.log``."""
        if not self._writes:
            return
        self._print(text)
        line = " ".join(text.split())
        try:
            with (self.folder / MESSAGES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{now()} step {self._step}: {line}\n")
        except OSError as error:
            raise save_error(self.folder / MESSAGES_FILE, error) from error

    def given_up(self, reason: str) -> None:
        """Say how the run ended where rank 0 can no longer do so; called on the lowest rank that lives."""
        failure = self._try(lambda: self._write_status("failed", PeerError.exit_code, one_line(reason)))
        if failure is not None:
            self._print(f"also, {STATUS_FILE} could not be written: {failure}")

    def _print(self, text: str) -> None:
        # soft_wrap: one line stays one line in a file, however narrow the console claims to be
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write_status(self, state: State, exit_code: int | None = None, reason: str = "") -> None:
        self._status_clock = time.monotonic()
        write_status(
            self.folder,
            state,
            exit_code,
            reason,
            step=self._step,
            total_steps=self._total_steps,
            started=self._started,
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        console=console,
        refresh_per_second=2,
    )


def _numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, those inside of a mapping under ``its name/``."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found.update(_numbers(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order; none where there is no such file. A torn last line is left out.

    Raises:
        ConfigError: a whole line is not a JSON object.
    """
    return [line for _, line in read_lines(Path(folder) / METRICS_FILE)]
