"""Regexes over names: what they matched, and what they nearly matched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

SHOWN_NAMES = 3


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names in which the regex is found (``re.search``: anchor it with ^ and $ for a whole name)."""
    compiled = re.compile(pattern)
    return [name for name in names if compiled.search(name)]


def nearest(pattern: str, names: Sequence[str]) -> str:
    """A few names that resemble the regex, for error messages."""
    plain = re.sub(r"[\\^$()\[\]?*+|{}]", "", pattern)
    # Long names drown a short pattern, so pieces of them are compared as well.
    best = difflib.get_close_matches(plain, names, n=SHOWN_NAMES, cutoff=0)
    pieces = {
        ".".join(parts[i:j]): name for name in names for parts in [name.split(".")] for i, j in _pieces(len(parts))
    }
    close = difflib.get_close_matches(plain, list(pieces), n=SHOWN_NAMES, cutoff=0.6)
    return ", ".join(list(dict.fromkeys([pieces[piece] for piece in close] + best))[:SHOWN_NAMES])


def _pieces(length: int) -> Iterable[tuple[int, int]]:
    return ((i, j) for i in range(length) for j in range(i + 1, min(i + 3, length) + 1))


def summary(names: Sequence[str]) -> str:
    """``4 tensors: a, b, c …``"""
    shown = ", ".join(names[:SHOWN_NAMES]) + (" …" if len(names) > SHOWN_NAMES else "")
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}: {shown}"
