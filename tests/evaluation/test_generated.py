"""Scores of generated answers, by set and group, over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.generated import ScoreSums
from digrap_scale.evaluation.suite import SetResult, SuiteResult, evaluate_suite
from digrap_scale.types import Batch

TEN = ["red"] * 2 + ["blue"] * 8  # "red" is worth 0.6


class Task:
    """Says what the batch's ids stand for."""

    generates = True

    def predict(self, generate: Any, batch: Batch) -> list[str]:
        assert not torch.is_grad_enabled()
        return [["red", "blue", "2"][i] for i in generate(batch.inputs, None).tolist()]


def batch(says: list[int], answers: list[list[str]], groups: list[str] | None = None, pad: int = 0) -> Batch:
    labels = torch.zeros(len(says), dtype=torch.int64)
    if pad:
        labels[-pad:] = -1
    return Batch({"ids": torch.tensor(says)}, labels, [], answers, groups or [])


FIRST = [batch([0, 1, 2], [TEN, TEN, ["two"]], ["what colour", "what colour", "how many"])]
SECOND = [batch([2], [["three"]], ["how many"]), batch([0], [], pad=1)]
PLAIN = [batch([0, 0], [["red"], ["blue"]])]


def run(loaders: dict[str, list[Batch]], gather: Any = None) -> SuiteResult:
    shifts: Any = dict.fromkeys(loaders, "near")
    return evaluate_suite(
        nn.Linear(1, 1), Task(), loaders, shifts, device="cpu", generate=lambda inputs, _: inputs["ids"], gather=gather
    )


def test_scores_by_group() -> None:
    result = run({"a": [*FIRST, *SECOND], "plain": PLAIN}).sets
    scores = [0.6, 1.0, 1.0, 0.0]
    mean = sum(scores) / 4
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4 / 4)
    assert result["a"] == SetResult("near", pytest.approx(mean), pytest.approx(spread), 4, result["a"].class_accuracy)
    assert result["a"].class_accuracy == {"how many": 0.5, "what colour": pytest.approx(0.8)}
    # Of right and wrong it is the binomial error.
    assert result["plain"] == SetResult("near", 0.5, pytest.approx(math.sqrt(0.25 / 2)), 2, {})


def test_ranks_add_up() -> None:
    """A rank that never saw a group, or only padding, changes nothing."""
    parts: list[Any] = []
    for mine in (FIRST, SECOND):
        with pytest.raises(StopIteration):  # what the other rank has comes later
            run({"a": mine}, gather=lambda sums: parts.append(sums) or next(iter(())))
    assert run({"a": SECOND}, gather=lambda _: parts) == run({"a": [*FIRST, *SECOND]})
    assert ScoreSums.merged(parts).of("a")[2] == 4


def test_no_answers_or_no_samples() -> None:
    with pytest.raises(ConfigError, match="a has no answers"):
        run({"a": [batch([0], [])]})
    with pytest.raises(ConfigError, match="a has no sample"):
        run({"a": [batch([0], [], pad=1)]})
