"""TRL's ``SFTTrainer`` on a small LLaVA with its processor: conversations about images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

import digrap_scale
from digrap_scale.errors import ConfigError
from digrap_scale.integrations.hf_trainer import DigrapCallback
from digrap_scale.integrations.trl import next_token_loss
from tests.integrations.trainer_runs import arguments
from tests.integrations.vlm_data import GLOBAL_BATCH, MAX_GRAD_NORM, METHOD, STEPS, adamw, load_pretrained, result

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def conversations() -> Dataset:
    draw = random.Random(3)
    found = []
    for _ in range(STEPS * GLOBAL_BATCH):
        colour = draw.choice(list(COLOURS))
        question = [
            {"type": "image"},
            {"type": "text", "text": draw.choice(["what colour is this ?", "what is this ?"])},
        ]
        answer = [{"type": "text", "text": draw.choice([colour, "a cat", "the answer is yes"])}]
        found.append(
            {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "images": [Image.new("RGB", (16, 16), COLOURS[colour])],
            }
        )
    return Dataset.from_list(found)


def make_trainer(folder: str, output: str, backend: str, ranks: int, **more: Any) -> SFTTrainer:
    settings = arguments(Path(output), backend, ranks)
    return SFTTrainer(
        load_pretrained(folder),
        SFTConfig(**{**settings, "max_length": None, "save_strategy": "no", "bf16": False}),
        train_dataset=conversations(),
        processing_class=AutoProcessor.from_pretrained(folder),
        **more,
    )


def sft(folder: str, output: str, backend: str, ranks: int) -> dict[str, Any]:
    more = {"compute_loss_func": next_token_loss} if backend == "fsdp2" else {}
    trainer = make_trainer(folder, output, backend, ranks, **more)
    found: dict[str, Any] = {}

    class Keeping(DigrapCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            assert self.projector is not None
            found.update(result(self.projector))
            super().on_train_end(*args, **kwargs)

    Keeping(reference=folder, **METHOD).add_to(trainer)
    trainer.train()
    return {**found, "history": trainer.state.log_history}


def refused(folder: str, output: str) -> str:
    """What is said to the fused head on FSDP2."""
    trainer = make_trainer(folder, output, "fsdp2", 2)
    DigrapCallback(reference=folder, **METHOD).add_to(trainer)
    try:
        trainer.train()
    except ConfigError as error:
        return str(error)
    return ""


def head_gradients(folder: str, output: str) -> dict[str, torch.Tensor]:
    """With TRL's fused head and with the model's own, on FSDP2: the first step's gradient of the LM head, whole."""
    found: dict[str, torch.Tensor] = {}
    for name, more in (("fused", {}), ("own", {"compute_loss_func": next_token_loss})):
        trainer = make_trainer(folder, f"{output}/{name}", "fsdp2", 2, **more)
        trainer.args.max_steps = 1

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: Any = None, name: str = name, **__: Any) -> None:
                found[name] = model.get_output_embeddings().weight.grad.full_tensor()

        trainer.add_callback(Look())
        trainer.train()
    return found


def sft_by_hand(folder: str, output: str) -> dict[str, Any]:
    """A plain loop over the batches that an SFTTrainer of one process makes."""
    trainer = make_trainer(folder, output, "ddp", 1)
    model = load_pretrained(folder)
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=folder, **METHOD)
    model.train()
    for batches in _grouped(trainer.get_train_dataloader(), GLOBAL_BATCH):
        answered = sum(int(batch["labels"].ne(-100).sum()) for batch in batches)
        for batch in batches:
            model(**batch, num_items_in_batch=answered).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return result(projector)


def _grouped(batches: Any, number: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == number:
            yield group
            group = []
