"""Rules between the keys of ``logging``."""

from __future__ import annotations

from collections.abc import Iterable

from .rules import Check, Problem


def _histograms(every_steps: int | None, tensorboard: bool) -> Iterable[Problem]:
    if every_steps is not None and not tensorboard:
        yield (
            ("logging", "histograms_every_steps"),
            "expected logging.tensorboard `true` for histograms, found `false`; they are shown there",
        )


LOGGING_CHECKS: tuple[Check, ...] = (Check(("logging.histograms_every_steps", "logging.tensorboard"), _histograms),)
