"""Linear probing, alone and as the first phase of fine-tuning (Kumar et al. 2022, arXiv 2202.10054). Shapes: L layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from digrap_scale.errors import ConfigError
from digrap_scale.method.base import Method


class LinearProbe(Method):
    """Only the head trains: the other layers' gradients do not reach the optimizer, nor the gradient norm.

    Backward still computes them; layers that are frozen before the model is wrapped (as ``method.name: linear_probe`` does
    in a config) cost nothing.

    Args:
        head: regexes of the head's parameter names.

    Raises:
        ValueError: no regex.
    """

    name = "linear_probe"
    rests_layers = True

    def __init__(self, head: Sequence[str]) -> None:
        if not head or isinstance(head, str):
            raise ValueError(f"head must be a list of regexes of the head's parameters, found {head!r}")
        self.head = list(head)

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        for pattern in self.head:
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(
                    f"method {self.name}: head: {pattern!r} matches no trained parameter ({_some(names)})"
                )
        self.head_L = torch.tensor([any(re.search(pattern, name) for pattern in self.head) for name in names])

    def resting(self) -> torch.Tensor:
        return ~self.head_L


class LPFT(LinearProbe):
    """LP-FT: the head alone for ``probe_steps`` steps, then everything, by an optimizer that starts anew (moments and counts
    of steps are 0 again), as two runs would do it. Steps that were skipped count.

    Learning rates are the caller's: see ``schedule`` in a config.

    Args:
        head: regexes of the head's parameter names.
        probe_steps: length of the first phase.

    Raises:
        ValueError: no regex, or no step.
    """

    name = "lp_ft"

    def __init__(self, head: Sequence[str], probe_steps: int) -> None:
        super().__init__(head)
        if not probe_steps > 0:
            raise ValueError(f"probe_steps must be positive, found {probe_steps}")
        self.probe_steps = probe_steps

    def prepare(self, projected_L: torch.Tensor, names: Sequence[str] = ()) -> None:
        super().prepare(projected_L, names)
        if bool(self.head_L.all()):
            raise ConfigError(f"method {self.name}: nothing but the head trains ({_some(names)}); use linear_probe")
        self.probing = True

    def begin_step(self, step: int) -> bool:
        ends = self.probing and step > self.probe_steps
        self.probing = self.probing and not ends
        return ends

    def resting(self) -> torch.Tensor:
        return ~self.head_L if self.probing else torch.zeros_like(self.head_L)

    def state(self) -> dict[str, Any]:
        return {"probing": int(self.probing)}

    def load(self, state: dict[str, Any]) -> None:
        self.probing = bool(state["probing"])


def _some(names: Sequence[str]) -> str:
    return f"they are {names[0]!r}, …" if names else "there are none"
