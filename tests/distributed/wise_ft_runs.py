"""Runs that end with interpolated weights; what the model computes with each of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from digrap_scale.config import parse_config
from digrap_scale.training import run, wise_ft
from digrap_scale.training.faults import StopRequest
from digrap_scale.training.folder_lock import FolderLock
from digrap_scale.training.setup import Place

ALPHAS = (0.0, 0.3, 0.5, 1.0)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def run_interpolated(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The run, in this process's place; α → the logits of ``IMAGES`` at each evaluation, and ``after`` all of them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
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
        with ExitStack() as watches, FolderLock(Path(values["run"]["folder"])) as lock:
            here = Place(rank, size, torch.device("cpu"))
            run._train(parse_config(yaml.safe_dump(values)), here, StopRequest(), watches, lock)
    finally:
        wise_ft.evaluate_run, run.interpolated_rows = originals
    return dict(zip([*(f"{alpha:g}" for alpha in ALPHAS), "after"], seen, strict=True))


def run_all_interpolated(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """Several runs, one after the other, in the same processes."""
    return {name: run_interpolated(values) for name, values in runs.items()}
