"""Runs that end with interpolated weights; what the model computes with each of them."""

from __future__ import annotations

from typing import Any

import torch

from digrap_scale.training import run, wise_ft
from tests.distributed.resume_runs import train_here

ALPHAS = (0.0, 0.3, 0.5, 1.0)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def run_interpolated(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The run, in this process's place; α → the logits of ``IMAGES`` at each evaluation, and ``after`` all of them."""
    seen: list[torch.Tensor] = []
    originals = wise_ft.evaluate_run, run.interpolated_rows

    def logits(engine: Any) -> torch.Tensor:
        engine.model.eval()
        with torch.no_grad():
            return engine.model(engine.cast(IMAGES)).logits.float().clone()

    def evaluated(built: Any, *arguments: Any) -> Any:
        seen.append(logits(built.engine))
        return originals[0](built, *arguments)

    def rows(built: Any, *arguments: Any) -> Any:
        found = originals[1](built, *arguments)
        seen.append(logits(built.engine))
        return found

    wise_ft.evaluate_run, run.interpolated_rows = evaluated, rows
    try:
        train_here(values)
    finally:
        wise_ft.evaluate_run, run.interpolated_rows = originals
    return dict(zip([*(f"{alpha:g}" for alpha in ALPHAS), "after"], seen, strict=True))


def run_all_interpolated(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """Several runs, one after the other, in the same processes."""
    return {name: run_interpolated(values) for name, values in runs.items()}
