"""What a run will write, against the room that its disk has."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from digrap_scale.checkpoint.layout import checkpoints_folder
from digrap_scale.config import Config
from digrap_scale.planning.show import show_bytes
from digrap_scale.planning.states import keeps_previous, moments
from digrap_scale.planning.weights import PlannedModel, model_bytes, stepped_bytes


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run's folder will hold at most.

    Attributes:
        checkpoint_bytes: of one checkpoint.
        checkpoints: how many there are at once: those kept, and the one that is being written.
        final_bytes: of ``final/``.
    """

    checkpoint_bytes: int
    checkpoints: int
    final_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it. Logs and metrics are small beside it, and not counted."""
        return self.checkpoint_bytes * self.checkpoints + self.final_bytes


def disk_need(model: PlannedModel, config: Config, total_steps: int) -> DiskNeed:
    """What ``config`` writes in ``total_steps``: weights as they are stepped, moments, and what a method keeps."""
    settings = config.checkpoint
    trained = sum(weight.numel for weight in model.trained)
    frozen = sum(weight.numel for weight in model.frozen)
    stepped = stepped_bytes(config)
    one = stepped * trained * (1 + moments(config)) + model.buffer_bytes
    if settings.frozen_weights:
        one += model_bytes(config) * frozen
    if keeps_previous(config):
        one += stepped * sum(weight.numel for weight in model.trained if weight.projected)
    if settings.deepspeed_native:
        one += 4 * trained * (1 + moments(config)) + 4 * (trained + frozen)
    made = 0 if settings.every_steps is None else total_steps // settings.every_steps
    for_good = 0
    if settings.keep_every_steps is not None and settings.every_steps is not None:
        both = max(settings.keep_every_steps, settings.every_steps)  # a lower bound of their common multiples
        for_good = total_steps // both
    # One more than is kept while the newest is not complete; a run that is stopped writes one, whatever its settings.
    count = max(1, min(made, settings.keep_last + for_good + 1))
    lora = config.model.lora is not None
    final = model_bytes(config) * (trained if lora else trained + frozen) if settings.final else 0
    return DiskNeed(one, count, final)


def disk_lines(need: DiskNeed, config: Config) -> tuple[str, str | None]:
    """A line that tells the need, and the problem if the disk has no such room (what the run's own earlier checkpoints take
    counts as free: they make way)."""
    folder = Path(config.run.folder)
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    told = (
        f"disk: {show_bytes(need.total_bytes)}: {need.checkpoints} checkpoints of {show_bytes(need.checkpoint_bytes)}, final "
        f"{show_bytes(need.final_bytes)}; {show_bytes(free)} are free"
    )
    if need.total_bytes <= free + _size(checkpoints_folder(folder)):
        return told, None
    return told, (
        f"run.folder: {folder}: expected {show_bytes(need.total_bytes)} for {need.checkpoints} checkpoints and final/, found "
        f"{show_bytes(free)} free; lower checkpoint.keep_last, raise checkpoint.keep_every_steps, or choose another disk"
    )


def _size(folder: Path) -> int:
    return sum(
        os.path.getsize(Path(where) / name) for where, _, names in os.walk(folder) for name in names
    )  # fmt: skip
