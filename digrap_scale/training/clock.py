"""Where a step's time goes, how much memory it took, and a window of torch's profiler."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from digrap_scale.config.schema import ProfilerConfig

PARTS = ("data", "forward", "backward", "optimizer")
PROFILE_FOLDER = "profile"


class StepClock:
    """Seconds of each part of a step, as the host waits for them.

    On an accelerator, which works on while the host goes on, only steps that are asked for are measured, with the device
    waited for at each part's ends; on the CPU all are.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type != "cpu"
        self._device = device
        self._measured = False
        self._steps = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def start_step(self, wanted: bool) -> None:
        """A step begins; ``wanted``: its times will be shown."""
        self._measured = wanted or not self._waits
        self._steps += self._measured

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One of ``PARTS``; several of a step add up. Traces show it as ``step/NAME``."""
        with record_function(f"step/{name}"):
            start = self._now()
            yield
            if self._measured:
                self._seconds[name] += self._now() - start

    def take(self) -> dict[str, float]:
        """Mean seconds of each part over the steps that were measured since the last call."""
        means = {name: seconds / max(self._steps, 1) for name, seconds in self._seconds.items()}
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return means

    def _now(self) -> float:
        if self._measured and self._waits:
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: allocated on the accelerator, or resident in host memory on the CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def profiling(settings: ProfilerConfig | None, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Profile a window of steps; yields what is to be called at each step's end. A trace a rank goes into ``profile/``."""
    if settings is None or (rank != 0 and not settings.every_rank):
        yield lambda: None
        return
    traces = folder / PROFILE_FOLDER
    traces.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.accelerator.is_available():
        activities += [a for a in (ProfilerActivity.CUDA, ProfilerActivity.XPU) if a in _supported()]

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(traces / f"rank-{rank}.json"))

    with profile(
        activities=activities,
        schedule=schedule(wait=settings.skip_steps, warmup=settings.warmup_steps, active=settings.steps, repeat=1),
        on_trace_ready=write,
        profile_memory=settings.memory,
        record_shapes=settings.memory,
    ) as profiler:
        yield profiler.step


def _supported() -> set[ProfilerActivity]:
    return set(torch.profiler.supported_activities())
