"""Accuracy as counts that can be summed over batches and ranks. Shapes: B samples in a batch, C classes."""

from __future__ import annotations

import math

import torch

IGNORED_LABEL = -1


def count_correct(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Right answers and real samples, class by class.

    A sample is right where its label's logit is the largest (the first of equals). Samples with label −1 (padding)
    count nowhere; a sample with a NaN among its logits counts as wrong.

    Args:
        logits_BC: [B, C] floating point.
        labels_B: [B] int64 on the same device, −1 or a class index.

    Returns:
        [2, C] int64: row 0 the right answers, row 1 the real samples, by the sample's own class. Add up over batches
        and ranks; ``.sum(-1)`` gives (right, total).

    Raises:
        ValueError: the shapes do not fit each other, or a label is out of range.
    """
    if logits_BC.ndim != 2 or labels_B.shape != logits_BC.shape[:1]:
        raise ValueError(f"logits {list(logits_BC.shape)} and labels {list(labels_B.shape)}: expected [B, C] and [B]")
    classes = logits_BC.shape[1]
    real_B = labels_B != IGNORED_LABEL
    counted_B = labels_B[real_B]
    if counted_B.numel() and not 0 <= int(counted_B.min()) <= int(counted_B.max()) < classes:
        lowest, highest = int(counted_B.min()), int(counted_B.max())
        raise ValueError(f"labels from {lowest} to {highest}, expected 0 to {classes - 1} ({classes} classes)")
    right_B = (logits_BC.argmax(-1) == labels_B) & ~logits_BC.isnan().any(-1)
    counts_2C = torch.zeros(2, classes, dtype=torch.int64, device=logits_BC.device)
    counts_2C[0].index_add_(0, counted_B, right_B[real_B].long())
    counts_2C[1].index_add_(0, counted_B, torch.ones_like(counted_B))
    return counts_2C


def accuracy(right: int, total: int) -> float:
    """right / total, in [0, 1]; NaN where there is no sample."""
    return right / total if total else math.nan


def standard_error(right: int, total: int) -> float:
    """Binomial standard error √(p(1 − p) / n) of an accuracy p over n samples; NaN where there is no sample."""
    p = accuracy(right, total)
    return math.sqrt(p * (1 - p) / total) if total else math.nan


def mean_standard_error(errors: list[float]) -> float:
    """Standard error √(Σ e²) / n of the plain mean of n independent accuracies; NaN of none."""
    return math.sqrt(sum(error * error for error in errors)) / len(errors) if errors else math.nan
