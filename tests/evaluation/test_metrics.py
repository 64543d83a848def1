from __future__ import annotations

import math

import pytest
import torch

from digrap_scale.evaluation import metrics


def test_counts_by_class_and_ignores_padding():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1], [9, 0, 0]])
    labels = torch.tensor([0, 1, 1, 2, -1])
    counts = metrics.count_correct(logits, labels)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 1, 1], [1, 2, 1]]


def test_counts_of_parts_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(101, 7), torch.randint(-1, 7, (101,))
    parts = sum(metrics.count_correct(x, y) for x, y in zip(logits.split(13), labels.split(13), strict=True))
    whole = metrics.count_correct(logits, labels)
    assert torch.equal(parts, whole)
    real = labels >= 0
    assert whole.sum(-1).tolist() == [int((logits.argmax(-1) == labels)[real].sum()), int(real.sum())]


def test_nan_logits_are_wrong_not_right():
    logits = torch.tensor([[math.nan, 0.0], [-math.inf, 0.0]])
    assert metrics.count_correct(logits, torch.tensor([0, 1])).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("labels", [[0, 3], [-2, 0]])
def test_label_out_of_range(labels):
    with pytest.raises(ValueError, match="expected 0 to 2"):
        metrics.count_correct(torch.zeros(2, 3), torch.tensor(labels))


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"\[2, 3\] and labels \[3\]"):
        metrics.count_correct(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


def test_errors():
    assert metrics.standard_error(40, 160) == pytest.approx(math.sqrt(0.25 * 0.75 / 160))
    assert metrics.standard_error(5, 5) == 0
    assert math.isnan(metrics.accuracy(0, 0)) and math.isnan(metrics.standard_error(0, 0))
    assert metrics.mean_standard_error([0.03, 0.04]) == pytest.approx(0.025)
