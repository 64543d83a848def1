"""Micro-batches that take several forwards, and packed ones, on a backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.config.schema import Config
from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Span
from digrap_scale.data.tasks.build import build_task
from digrap_scale.training.batches import forwards
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.loop import accumulate
from digrap_scale.training.setup import Place
from digrap_scale.types import Batch
from tests.distributed.vqa_runs import STEP_SAMPLES, TRAIN


def run_forwards(config: Config) -> dict[str, Any]:
    """Two steps; weights (rank 0), each step's loss over the ranks, this rank's samples of each forward."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    here = Place(rank, ranks, torch.device("cpu"))
    run = build_run(config, here)
    projector = attach_projector(run, config)
    task: Any = build_task(config, run.built.processor, run.built.tokenizer, True, run.built.family)
    shards = ShardSet.open(config.data.train)
    samples = [{**one, "seed": 0} for one in samples_of([Span(0, 0, len(TRAIN))], shards.paths)]
    size, steps = run.engine.micro_batch_samples, len(TRAIN) // STEP_SAMPLES
    assert size * ranks * run.engine.accumulation_steps == STEP_SAMPLES
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    stream = iter([task.micro_batch(piece) for piece in pieces[rank::ranks]])
    run.engine.model.train()
    losses, counts = [], []

    def cut(batch: Batch) -> list[tuple[Batch, float]]:
        parts = forwards(batch, task, config, here)
        counts.append([len(part.keys) for part, _ in parts])
        return parts

    for _ in range(steps):
        loss = accumulate(run.engine, projector, task, stream, cut=cut)
        run.engine.step()
        here.sum_(loss)
        losses.append(float(loss) / ranks)
    projector.detach()
    state = run.engine.full_state_dict()
    return {"weights": state if rank == 0 else {}, "losses": losses, "counts": counts}


def run_all_forwards(configs: dict[str, Config]) -> dict[str, Any]:
    return {name: run_forwards(config) for name, config in configs.items()}
