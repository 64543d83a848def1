"""Choosing a setting by ID validation. What these functions are given holds no other number, so that nothing else can decide."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

Option = TypeVar("Option", bound=Hashable)


def select(validation: Mapping[Option, Sequence[float]]) -> Option:
    """The option with the highest mean accuracy on ID validation; of equals the first.

    Args:
        validation: option → its accuracies on what was withheld from training, one a seed of the search. Not empty.
    """
    return max(validation, key=lambda option: fmean(validation[option]))  # max keeps the first of equals
