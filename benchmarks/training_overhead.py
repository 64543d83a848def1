"""What DiGraP adds to a whole training step (forward, backward, optimizer) over plain fine-tuning, in one run.

    python benchmarks/training_overhead.py                         a ViT-B/16-sized classifier
    python benchmarks/training_overhead.py --model llava           a small LLaVA (random weights, 90 M parameters)
    torchrun --nproc-per-node 2 benchmarks/training_overhead.py    FSDP2

Steps with and without the method are taken in turn on the same weights and moments, so that a machine whose speed drifts
still gives a ratio that holds; where steps differ by more than the method takes, read the optimizer's own part. The
larger the batch, the smaller the share of the optimizer's step: the batch is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from yardsticks import seconds

import digrap_scale


def vit(samples: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """ViT-B/16 at 224 px: 86 M parameters, 197 tokens."""
    model = ViTForImageClassification(ViTConfig(num_labels=1000))
    return model, {"pixel_values": torch.randn(samples, 3, 224, 224), "labels": torch.randint(0, 1000, (samples,))}


def llava(samples: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LLaVA of 90 M parameters: 196 image tokens and 60 of text."""
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
    )
    text = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=8000,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=7999))
    ids = torch.cat([torch.full((samples, 196), 7999), torch.randint(0, 7000, (samples, 60))], dim=1)
    labels = ids.clone()
    labels[:, :196] = -100
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(samples, 3, 224, 224),
        "labels": labels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("vit", "llava"), default="vit")
    parser.add_argument("--samples", type=int, default=8, help="batch of one process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--method", default="digrap", choices=("digrap", "digrap_update"))
    parser.add_argument("--statistics", default="step", choices=("step", "backward"))
    options = parser.parse_args()
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    model, batch = (vit if options.model == "vit" else llava)(options.samples)
    if world_size > 1:
        dist.init_process_group()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
        for module in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]:
            fully_shard(module)
        fully_shard(model)
    with_method = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    plain.state = with_method.state  # one set of moments for both
    projector = digrap_scale.attach(
        model,
        with_method,
        method=options.method,
        reference="initial",
        statistics=options.statistics,
    )

    def step(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        """Seconds of the whole step, and of the optimizer's with what hangs on it."""
        projector.expect_step(optimizer is with_method)
        forward_and_backward = seconds(lambda: model(**batch).loss.backward())
        stepping = seconds(optimizer.step)
        return forward_and_backward + stepping + seconds(optimizer.zero_grad), stepping

    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for round_ in range(options.rounds + 2):
        for kept, optimizer in zip(times, (plain, with_method), strict=True):
            if world_size > 1:
                dist.barrier()
            elapsed = step(optimizer)
            if round_ >= 2:  # the first ones compile and allocate
                kept.append(elapsed)
    if rank == 0:
        (base, base_optimizer), (full, full_optimizer) = (
            [statistics.median(column) for column in zip(*kept, strict=True)] for kept in times
        )
        pairs = statistics.median(b[0] / a[0] - 1 for a, b in zip(*times, strict=True))
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{options.model} {options.method} (statistics in {options.statistics}): plain {base * 1e3:.0f} ms, with method "
            f"{full * 1e3:.0f} ms, overhead {100 * (full / base - 1):+.1f} % (pairs: median {100 * pairs:+.1f} %); "
            f"optimizer's step {base_optimizer * 1e3:.0f} and {full_optimizer * 1e3:.0f} ms, the difference is "
            f"{100 * (full_optimizer - base_optimizer) / base:.1f} % of a plain step; {parameters / 1e6:.0f} M parameters, "
            f"{options.samples} samples a process, {world_size} process(es)"
        )
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
