"""A few steps of a run, to see whether it starts, how long a step takes and what it needs. Nothing is written."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from digrap_scale.config import Config
from digrap_scale.data.tasks.build import build_task
from digrap_scale.errors import ConfigError
from digrap_scale.planning.show import show_bytes
from digrap_scale.training.batches import count_steps, open_training_data, training_loader
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.clock import peak_memory_bytes
from digrap_scale.training.faults import Nobody
from digrap_scale.training.log import RunLog
from digrap_scale.training.loop import train_steps
from digrap_scale.training.prepare import refuse
from digrap_scale.training.setup import Place, choose_operators, imagine_reduction, imagined_place, place
from digrap_scale.training.validate import find_problems


@dataclass(frozen=True)
class DryRun:
    """What was measured on this rank.

    Attributes:
        step_s: of every step, in seconds; the first one makes buffers and optimizer state.
        peak_bytes: the most memory that the device's allocator gave out; on the CPU, this process's resident memory.
        resident_before_bytes: on the CPU, resident before the model was built (libraries); 0 otherwise.
    """

    step_s: list[float]
    peak_bytes: int
    resident_before_bytes: int


class _Enough(Exception):
    """The steps asked for are taken."""


class _StopWatch:
    """Between two steps: note the time, and end after ``steps`` of them."""

    watch = Nobody()

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self.step_s: list[float] = []
        self._last = time.perf_counter()

    def after_step(self, step: int) -> None:
        """See ``BetweenSteps``. Raises: _Enough."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.step_s.append(now - self._last)
        self._last = now
        if step == self._steps:
            raise _Enough


def dry_run(config: Config, steps: int, world_size: int | None, message: Callable[[str], None]) -> DryRun:
    """Take the first ``steps`` steps of ``config``, without a folder, checkpoints or evaluation.

    Under a launcher the job's processes take them; else this one alone, or, with ``world_size``, as rank 0 of a job
    whose other ranks are imagined (``imagined_place``): its memory is a rank's, its loss means nothing, and its
    collectives take no time.

    Args:
        config: the run.
        steps: at least 1, at most the run's.
        world_size: of an imagined job; None for the launcher's, or 1.
        message: is given lines to show, on rank 0.

    Raises:
        ConfigError: every problem of the config, or a world size that is not to be had.
    """
    if steps < 1:
        raise ConfigError(f"--dry-run: expected 1 step or more, found {steps}")
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size: expected 1 or more, found {world_size}")
    choose_operators(config)
    imagined = world_size is not None and world_size > 1
    where: AbstractContextManager[Place] = (
        imagined_place(config, world_size) if imagined and world_size else place(config)
    )
    with where as here:
        found = _steps(config, steps, here, imagined, message if here.rank == 0 else lambda _: None)
        if here.rank == 0:
            _tell(found, here, imagined, message)
        return found


def _steps(config: Config, steps: int, here: Place, imagined: bool, message: Callable[[str], None]) -> DryRun:
    here.on_rank_0(lambda: refuse(find_problems(config)))
    before = _resident_bytes() if here.device.type == "cpu" else 0
    if here.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    data = open_training_data(config).sources
    total_steps = count_steps(config, sum(source.shards.samples for source in data))
    if steps > total_steps:
        raise ConfigError(f"--dry-run: expected at most the run's {total_steps} steps, found {steps}")
    run = build_run(config, here)
    if imagined:
        imagine_reduction(run.engine.model)
    projector = attach_projector(run, config)
    message(projector.summary())
    task = build_task(config, run.built.processor, run.built.tokenizer, True, run.built.family)
    batches = training_loader(data, task, config, here, run.engine)
    # Of a rank other than 0: such a log writes and shows nothing.
    log = RunLog(
        Path(config.run.folder),
        rank=1,
        total_steps=total_steps,
        tensorboard=False,
        every_steps=1,
        strength_every_steps=1,
    )
    watch = _StopWatch(steps, here.device)
    try:
        train_steps(run.engine, projector, task, batches, log, config, here, total_steps, watch)
    except _Enough:
        pass  # how it ends
    projector.detach()
    peak = peak_memory_bytes(here.device)
    return DryRun(watch.step_s, peak, before)


def _tell(found: DryRun, here: Place, imagined: bool, message: Callable[[str], None]) -> None:
    ranks = f"rank 0 of {here.world_size}" + (", the others imagined" if imagined else "")
    later = found.step_s[1:] or found.step_s
    times = f"first {found.step_s[0]:.3g} s, then {statistics.median(later):.3g} s (median of {len(later)})"
    message(f"dry run: {len(found.step_s)} steps as {ranks}: {times}")
    if here.device.type == "cpu":
        grown = show_bytes(max(0, found.peak_bytes - found.resident_before_bytes))
        message(f"peak resident memory: {show_bytes(found.peak_bytes)}, of which {grown} since the model was built")
    else:
        message(f"peak memory of the device's allocator: {show_bytes(found.peak_bytes)}")


def _resident_bytes() -> int:
    """What this process holds in memory now, where the system tells (Linux); else its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory_bytes(torch.device("cpu"))
    return pages * resource.getpagesize()
