"""A run's model in Hugging Face layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint.atomic import atomic_folder
from digrap_scale.training.build_run import BuiltRun
from digrap_scale.training.setup import Place


def save_final(run: BuiltRun, folder: Path, here: Place) -> None:
    """Write the model to ``folder`` in Hugging Face layout: safetensors, config, processor, tokenizer. Collective."""
    state = run.engine.full_state_dict()

    def write() -> None:
        with atomic_folder(folder, overwrite=True) as partial:
            _save_model(run, partial, state)
            _save_processors(run, partial)

    here.on_rank_0(write)  # nobody goes on, or leaves, before the files are there


def save_small_files(run: BuiltRun, folder: Path) -> None:
    """Everything of ``save_final`` but the weights: the model's (or adapter's) config, processor, tokenizer."""
    model: Any = run.built.model
    if hasattr(model, "peft_config"):
        for settings in model.peft_config.values():
            settings.save_pretrained(folder)
        model = model.get_base_model()
    config = copy.deepcopy(model.config)
    config.architectures = [run.base_class.__name__]
    config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)
    _save_processors(run, folder)


def _save_processors(run: BuiltRun, folder: Path) -> None:
    for part in (run.built.processor, run.built.tokenizer):
        if part is not None:
            part.save_pretrained(folder)


def _save_model(run: BuiltRun, folder: Path, state: dict[str, torch.Tensor]) -> None:
    model: Any = run.built.model
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=state)
        return
    # FSDP2 and DeepSpeed change the live model's class and parameters: save through one without weights of its own.
    with torch.device("meta"):
        twin: Any = run.model_class(model.config)
    twin.save_pretrained(folder, state_dict=state)
