"""What a rule that ties several keys together is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
Problem = tuple[Path, str]


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        needs: dotted keys whose values ``run`` takes, in this order; it runs only if none of them has a problem.
        run: yields (path of the key to mend, message).
    """

    needs: tuple[str, ...]
    run: Callable[..., Iterable[Problem]]
