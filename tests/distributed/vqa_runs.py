"""Families of vision-language models on a backend: two steps on mixed batches, generation in lockstep, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.config.schema import Config
from digrap_scale.data.loader import build_evaluation_loader
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

# Images of each sample. Six samples a step, so that the first half, or third, of each step's is one rank's.
TRAIN = [0, 0, 0, 1, 2, 1, 3, 1, 1, 0, 0, 0]
TEST = [1, 0, 2, 1, 1, 0, 1]
STEP_SAMPLES = 6
EARLY_ENDS = list(range(3, 24))  # many tokens end an answer, so that rows and ranks end at different lengths


def vqa_config(
    model: str, backend: str, folder: str, train: str, test: str, precision: str = "none", **model_settings: Any
) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": folder},
            "model": {"path": model, "task": "vqa", **model_settings},
            "data": {"train": [train]},
            "method": {"name": "digrap", "strength_lr": 0.05},
            # Not Adam: a gradient that is zero but for rounding would move its weight by a whole step.
            "optimizer": {"name": "sgd", "learning_rate": 2e-3, "momentum": 0.9},
            "sharding": {"backend": backend, "mixed_precision": precision},
            "training": {"steps": 2, "global_batch_samples": STEP_SAMPLES, "max_grad_norm": 1.0},
            "evaluation": {
                "suite": [{"name": "test", "shards": [test], "shift": "id"}],
                "batch_samples": 2,
                "generation": {"max_new_tokens": 6},
            },
        }
    )


def run_vqa(config: Config) -> dict[str, Any]:
    """Trains, generates, saves to ``run.folder``/final; weights (rank 0), answers by key, loss of each step."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    here = Place(rank, ranks, torch.device("cpu"))
    run = build_run(config, here)
    projector = attach_projector(run, config)
    task: Any = build_task(config, run.built.processor, run.built.tokenizer, True, run.built.family)
    shards = ShardSet.open(config.data.train)
    samples = [{**one, "seed": 0} for one in samples_of([Span(0, 0, len(TRAIN))], shards.paths)]
    share = STEP_SAMPLES // ranks
    starts = [step * STEP_SAMPLES + rank * share for step in range(2)]
    batches = iter([task.collate(samples[start : start + share]) for start in starts])
    run.engine.model.train()
    losses = []
    for _ in range(2):
        loss = accumulate(run.engine, projector, task, batches, lambda doing: None)
        run.engine.step()
        here.sum_(loss)
        losses.append(float(loss) / ranks)
    report = vars(projector.report).copy()
    kept: Any = projector._reference
    references = {
        spec.name: projector.backend.gather(layer, kept.slices_L[layer])
        for layer, spec in enumerate(projector.backend.specs)
        if "magnitude" in spec.name
    }
    strength = projector.strength()
    projector.detach()
    save_final(run, Path(config.run.folder) / "final", here)
    run.task.generation.eos_token_id = EARLY_ENDS  # type: ignore[union-attr]
    answers = generate_all(run, config, here)
    inputs = prepared(run.engine, task.collate(samples[rank::ranks])).inputs
    del inputs["labels"]
    with run.engine.inference(), evaluation_mode(run.engine.model), torch.no_grad():
        logits = run.engine.model(**inputs).logits
    state = run.engine.full_state_dict()
    return {
        "weights": state if rank == 0 else {},
        "answers": answers,
        "losses": losses,
        "report": report,
        "references": references,
        "strength": strength,
        "inputs": inputs,
        "logits": logits,
    }


def generate_all(run: Any, config: Config, here: Place) -> dict[str, list[int]]:
    """Key → new ids of the test samples that are this rank's, without padding."""
    loader = build_evaluation_loader(
        ShardSet.open(config.evaluation.suite[0].shards),
        run.task,
        batch_samples=config.evaluation.batch_samples,
        rank=here.rank,
        world_size=here.world_size,
        workers=0,
        seed=0,
    )
    answers: dict[str, list[int]] = {}
    with run.engine.inference(), evaluation_mode(run.engine.model), torch.no_grad():
        for batch in loader:
            batch = prepared(run.engine, batch)
            ids = run.engine.generate(batch.inputs, run.task.generation)[:, batch.inputs["input_ids"].shape[1] :]
            for key, row in zip(batch.keys, ids.tolist(), strict=False):
                end = next((i + 1 for i, token in enumerate(row) if token in EARLY_ENDS), len(row))
                answers[key] = row[:end]
    return answers


def run_all_vqa(configs: dict[str, Config]) -> dict[str, Any]:
    return {name: run_vqa(config) for name, config in configs.items()}


def merged_answers(results: Sequence[dict[str, Any]], name: str) -> dict[str, list[int]]:
    return {key: ids for rank in results for key, ids in rank[name]["answers"].items()}


def evaluate_all(configs: dict[str, Config]) -> dict[str, Any]:
    """Name → the suite's scores as this rank has them, and the texts that this rank's samples got."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    here = Place(rank, ranks, torch.device("cpu"))
    found = {}
    for name, config in configs.items():
        run = build_run(config, here)
        task: Any = run.task
        told: dict[str, str] = {}
        predict = task.predict

        def predict_and_tell(generate: Any, batch: Any, predict: Any = predict, told: Any = told) -> list[str]:
            texts: list[str] = predict(generate, batch)
            told.update(zip(batch.keys, texts, strict=False))
            return texts

        task.predict = predict_and_tell
        found[name] = {
            "suite": evaluate_run(run, config, here, open_evaluation(config, open_training_data(config))).to_dict(),
            "told": told,
        }
    return found
