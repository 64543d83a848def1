"""Classifiers and dual encoders on a backend, through the parts of a run: two steps, an evaluation, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.config.schema import Config
from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Span
from digrap_scale.data.tasks.build import build_task
from digrap_scale.evaluation.suite import evaluation_mode
from digrap_scale.training.batches import open_training_data
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.evaluate import evaluate_run, open_evaluation
from digrap_scale.training.final import save_final
from digrap_scale.training.loop import accumulate, prepared
from digrap_scale.training.setup import Place

STEPS, STEP_SAMPLES = 2, 6


def encoder_config(
    model: str, task: str, backend: str, folder: str, shards: str, classes: str, new_head: bool
) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": folder},
            "model": {"path": model, "task": task, "new_head": new_head},
            "data": {"train": [shards], "classes": classes},
            "method": {"name": "digrap", "strength_lr": 0.05},
            "optimizer": {"name": "sgd", "learning_rate": 5e-3, "momentum": 0.9},
            "sharding": {"backend": backend},
            "training": {"steps": STEPS, "global_batch_samples": STEP_SAMPLES},
            "evaluation": {"suite": [{"name": "same", "shards": [shards], "shift": "id"}], "batch_samples": 4},
        }
    )


def run_encoder(config: Config) -> dict[str, Any]:
    """Weights, loss of each step, the suite's result, and logits of the first samples after training."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    here = Place(rank, ranks, torch.device("cpu"))
    run = build_run(config, here)
    projector = attach_projector(run, config)
    task = build_task(config, run.built.processor, run.built.tokenizer, train=True)
    shards = ShardSet.open(config.data.train)
    samples = [{**one, "seed": 0} for one in samples_of([Span(0, 0, STEPS * STEP_SAMPLES)], shards.paths)]
    share = STEP_SAMPLES // ranks
    starts = [step * STEP_SAMPLES + rank * share for step in range(STEPS)]
    collated = [task.collate(samples[start : start + share]) for start in starts]
    batches = iter(collated)
    run.engine.model.train()
    losses = []
    for _ in range(STEPS):
        loss = accumulate(run.engine, projector, task, batches, lambda doing: None)
        run.engine.step()
        here.sum_(loss)
        losses.append(float(loss) / ranks)
    projector.detach()
    save_final(run, Path(config.run.folder) / "final", here)
    result = evaluate_run(run, config, here, open_evaluation(config, open_training_data(config))).to_dict()
    first = prepared(run.engine, collated[0])
    with run.engine.inference(), evaluation_mode(run.engine.model), torch.no_grad():
        logits = task.logits(run.engine.model, first)
    state = run.engine.full_state_dict()
    return {
        "weights": state if rank == 0 else {},
        "losses": losses,
        "result": result,
        "inputs": first.inputs,
        "logits": logits,
    }


def run_all_encoders(configs: dict[str, Config]) -> dict[str, Any]:
    return {name: run_encoder(config) for name, config in configs.items()}
