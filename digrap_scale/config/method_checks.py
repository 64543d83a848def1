"""Rules between the method's keys, and between them and other sections. Keys that a method's section leaves out are absent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .rules import Check, Problem

BLOCK_PATTERN = r"^.*?\.\d+(?=\.)"  # up to the first number: model.layers.3


def _ftp(method: Mapping[str, Any], source: str, lora: object) -> Iterable[Problem]:
    if method["name"] == "ftp" and (source == "zero" or (lora is not None and source != "initial")):
        given = " and model.lora" if source != "zero" else ""
        yield (
            ("reference", "source"),
            f"expected `initial` with method.name `ftp`{given}, found `{source}`; its first step puts weights back to the "
            "reference, and zeros learn nothing",
        )


def _head(method: Mapping[str, Any], new_head: bool, task: str) -> Iterable[Problem]:
    if method["name"] in ("linear_probe", "lp_ft") and not method.get("head") and not new_head:
        examples = {"classification": "`classifier`", "contrastive": "`visual_projection`"}
        yield (
            ("method", "head"),
            "expected regexes of the head's parameters, found none; nothing starts new (model.new_head is false): say what "
            f"the head is ({examples.get(task, '`lm_head` or `multi_modal_projector`')})",
        )


def _probe_steps(method: Mapping[str, Any], warmup_steps: int, steps: int | None) -> Iterable[Problem]:
    if method["name"] != "lp_ft":
        return
    probe_steps = method["probe_steps"]
    if probe_steps <= warmup_steps:
        yield (
            ("method", "probe_steps"),
            f"expected more than schedule.warmup_steps ({warmup_steps}), found {probe_steps}; each phase warms up",
        )
    if steps is not None and steps - probe_steps <= warmup_steps:
        yield (
            ("method", "probe_steps"),
            f"expected fewer than training.steps − schedule.warmup_steps ({steps - warmup_steps}), found {probe_steps}; each "
            "phase warms up",
        )


def _ablations(method: Mapping[str, Any]) -> Iterable[Problem]:
    """Keys that would have no effect."""
    if method.get("fixed_strength") is not None:
        for key, default in (("strength_lr", 1e-2), ("normalization", "layers"), ("hypergradient", "all")):
            if (value := method.get(key, default)) != default:
                yield ("method", key), f"expected no value with method.fixed_strength, found {value}; ω is not learned"
    if method.get("grouping", "tensor") != "block" and method.get("block_pattern", BLOCK_PATTERN) != BLOCK_PATTERN:
        yield (
            ("method", "block_pattern"),
            f"expected no value with method.grouping `{method.get('grouping', 'tensor')}`, found "
            f"{method['block_pattern']!r}; it is for `block`",
        )


def _interpolation(
    alphas: Sequence[float], suite: Sequence[object], at_end: bool, lora: Mapping[str, Any] | None, batch_norm: str
) -> Iterable[Problem]:
    key = ("evaluation", "interpolate_alphas")
    if not alphas:
        return
    if len(set(alphas)) < len(alphas):
        yield key, f"expected each number once, found {list(alphas)}"
    if not suite or not at_end:
        missing = "evaluation.suite" if not suite else "evaluation.at_end"
        yield key, f"expected no value without {missing}, found {list(alphas)}; nothing is evaluated after training"
    if lora is not None and dict(lora).get("dora"):
        yield (
            key,
            f"expected no value with model.lora.dora, found {list(alphas)}; its magnitudes are no difference of weights",
        )
    if batch_norm == "train":
        yield (
            key,
            f"expected no value with model.batch_norm `train`, found {list(alphas)}; its statistics are no weights: use "
            "digrap-scale interpolate, which mixes them too, or `frozen`",
        )


METHOD_CHECKS = (
    Check(
        ("evaluation.interpolate_alphas", "evaluation.suite", "evaluation.at_end", "model.lora", "model.batch_norm"),
        _interpolation,
    ),
    Check(("method",), _ablations),
    Check(("method", "reference.source", "model.lora"), _ftp),
    Check(("method", "model.new_head", "model.task"), _head),
    Check(("method", "schedule.warmup_steps", "training.steps"), _probe_steps),
)
