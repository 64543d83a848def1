"""Lightning's Trainer on real processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader

from digrap_scale.integrations.lightning_callback import DigrapCallback
from tests.integrations.vlm_data import (
    MAX_GRAD_NORM,
    METHOD,
    STEPS,
    adamw,
    load_pretrained,
    result,
    samples,
    stacked,
)


class Tuned(lightning.LightningModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.wrapped = load_pretrained(folder)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.wrapped(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Keeping(DigrapCallback):
    """Keeps what training came to, before it is taken down."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.projector is not None
        self.found = result(self.projector)
        super().on_train_end(trainer, pl_module)


def fit(folder: str, output: str, ranks: int, resume: bool) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    middle = Path(output) / f"step={STEPS // 2}.ckpt"
    callback = Keeping(reference=folder, **METHOD)
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        output, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        plugins=[TorchElasticEnvironment()] if ranks > 1 else [],
        max_steps=STEPS,
        use_distributed_sampler=False,  # Lightning's own shuffles
        accumulate_grad_batches=4 // ranks,
        gradient_clip_val=MAX_GRAD_NORM,
        callbacks=[callback] if resume else [callback, save],
        logger=False,
        enable_checkpointing=not resume,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output,
    )
    os.environ.setdefault("GROUP_RANK", "0")
    data = samples()
    if resume:  # Lightning counts on where it was, but reads a loader without state from its start
        data = data[len(data) // 2 :] + data[: len(data) // 2]
    loader = DataLoader(data[int(os.environ.get("RANK", "0")) :: ranks], batch_size=1, collate_fn=stacked)
    trainer.fit(Tuned(folder), loader, ckpt_path=str(middle) if resume else None)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name.removeprefix("wrapped."): value for name, value in callback.found["weights"].items()}
    strength = {name.removeprefix("wrapped."): value for name, value in callback.found["strength"].items()}
    return {**callback.found, "weights": weights, "strength": strength, "logged": logged}


def fit_and_resume(folder: str, output: str, _: str, ranks: int) -> dict[str, Any]:
    whole = fit(folder, output, ranks, False)
    torch.manual_seed(99)
    return {"whole": whole, "resumed": fit(folder, output, ranks, True)}
