"""A loop of Accelerate's as its users write it, on real processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader

import digrap_scale
from tests.integrations.trainer_runs import ZERO, allow_sharding_on_cpu
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


def make_accelerator(backend: str, accumulation: int) -> Accelerator:
    if backend != "ddp":
        allow_sharding_on_cpu()
    if backend == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer", "CLIPEncoderLayer"],
        )
        return Accelerator(cpu=True, gradient_accumulation_steps=accumulation, fsdp_plugin=plugin)
    if backend.startswith("zero"):
        config = {
            **ZERO,
            "zero_optimization": {"stage": int(backend[-1])},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": MAX_GRAD_NORM,
        }
        return Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation)


def loop(folder: str, accelerator: Accelerator, saved: str, resume: bool) -> dict[str, Any]:
    model = load_pretrained(folder)
    model, optimizer, loader = accelerator.prepare(
        model, adamw(model), DataLoader(samples(), batch_size=1, collate_fn=stacked)
    )
    projector = digrap_scale.attach(model, optimizer, reference=folder, **METHOD)
    accelerator.register_for_checkpointing(projector)
    start = STEPS // 2 if resume else 0
    if resume:
        accelerator.load_state(saved)
        assert projector.report.step == start
        loader = accelerator.skip_first_batches(loader, start * accelerator.gradient_accumulation_steps)
    model.train()
    done = start
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            if done == STEPS // 2 and not resume:
                accelerator.save_state(saved)
    found = result(projector)
    projector.detach()
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    return found


def loop_and_resume(folder: str, backend: str, ranks: int, saved: str) -> dict[str, Any]:
    accelerator = make_accelerator(backend, 4 // ranks)
    whole = loop(folder, accelerator, saved, False)
    torch.manual_seed(99)
    return {"whole": whole, "resumed": loop(folder, accelerator, saved, True)}
