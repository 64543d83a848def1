"""Dialogues on whole pages: the last phase of the small VLM's pre-training; the image tower is frozen again.

    torchrun --nproc-per-node 2 tools/converse_pictogram_vlm.py --model FOLDER --shards FOLDER --out FOLDER [--steps 130]

The pages of the pre-training shards are each asked for both captions and a question of every type in one dialogue
(``align_pictogram_vlm.dialogue``): one pass of the image tower serves eight or nine answers, which is what a run of
single questions spends most of its time on. Alone or under torchrun: gradients are averaged over processes. Writes a Hugging Face folder and ``converse.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import align_pictogram_vlm as align
import pictograms as pg

from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo import scenes

SEED = 1
BATCH_PAGES = 16  # over all processes
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 15


def batches(processor: Any, shards: Path, rank: int, world_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This process's share of each batch of pages, in the shards' order, over and over."""
    kinds = pg.make_split().label
    pages = (sample for _ in itertools.count() for sample in vqa.read_set(shards, "pretraining"))
    mine = itertools.islice(pages, rank, None, world_size)
    for number in itertools.count():
        rng = random.Random(f"{SEED}/{rank}/{number}")
        samples = list(itertools.islice(mine, BATCH_PAGES // world_size))
        told = []
        for sample in samples:
            cells = sample["meta"]["concepts"]
            scene: scenes.Scene = (cells[0], cells[1], cells[2], cells[3])
            told.append(align.encode(processor, align.dialogue(scene, kinds, rng)))
        images = processor.image_processor(images=[sample["image"] for sample in samples], return_tensors="pt")
        yield {**align.padded(processor, told), "pixel_values": images["pixel_values"]}


def converse(start: Path, shards: Path, out: Path, steps: int) -> None:
    """Run the phase and write model, processor and log into ``out``."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(start)
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=align.WEIGHT_DECAY)
    stream = batches(processor, shards, rank, world_size)
    with open(out / "converse.jsonl" if rank == 0 else os.devnull, "w", encoding="utf-8") as log:
        for step, batch in enumerate(itertools.islice(stream, steps)):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * align.rate(step, steps, WARMUP_STEPS)
            loss = model(**batch).loss
            loss.backward()
            if world_size > 1:
                for parameter in parameters:
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(world_size)
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 9 or step == 0:
                line = {"step": step + 1, "loss": round(loss.item(), 4), "grad_norm": round(norm.item(), 3)}
                print(json.dumps(line | {"seconds": round(time.monotonic() - started, 1)}), file=log, flush=True)
    if rank == 0:
        model.save_pretrained(out)
        processor.save_pretrained(out)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to go on with")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the pre-training shards")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=130, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    converse(options.model, options.shards, options.out, options.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
