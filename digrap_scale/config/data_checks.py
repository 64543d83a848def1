"""Rules over several keys for data that are measured: what is withheld from training, and degrees of shift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .rules import Check, Problem

VALIDATION = "validation"  # the test set of what data.hold_out withholds


def _hold_out(
    hold_out: object, target: str, on_bad_sample: str, suite: Sequence[Mapping[str, Any]]
) -> Iterable[Problem]:
    if hold_out is None:
        return
    if target == "caption":
        yield (
            ("data", "hold_out"),
            "expected nothing with data.target `caption`, found a section; captions have no score",
        )
    if on_bad_sample == "skip":
        yield (
            ("data", "on_bad_sample"),
            "expected `error` with data.hold_out, found `skip`; a score over fewer samples is another score",
        )
    if not suite:
        yield (
            ("data", "hold_out"),
            "expected nothing without evaluation.suite, found a section; nothing would measure it",
        )
    for index, entry in enumerate(suite):
        if entry["name"] == VALIDATION:
            yield (
                ("evaluation", "suite", index, "name"),
                f"expected another name with data.hold_out, found `{VALIDATION}`, which is that of what is withheld",
            )


def _shift_degree(
    shift_degree: Mapping[str, Any] | None, suite: Sequence[object], target: str, on_bad_sample: str
) -> Iterable[Problem]:
    if shift_degree is None:
        return
    if not suite:
        yield ("evaluation", "shift_degree"), "expected nothing without evaluation.suite, found a section; remove it"
    if target == "caption":
        yield (
            ("evaluation", "shift_degree"),
            "expected nothing with data.target `caption`, found a section; it reads the training shards' labels",
        )
    if on_bad_sample == "skip":
        yield (
            ("data", "on_bad_sample"),
            "expected `error` with evaluation.shift_degree, found `skip`; it reads every training sample",
        )


DATA_CHECKS = (
    Check(("data.hold_out", "data.target", "data.on_bad_sample", "evaluation.suite"), _hold_out),
    Check(("evaluation.shift_degree", "evaluation.suite", "data.target", "data.on_bad_sample"), _shift_degree),
)
