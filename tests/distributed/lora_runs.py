"""The toy model with low-rank adapters on a backend, and the same loss as a pure function of adapters and head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import digrap_scale
from digrap_scale.reference.store import SafetensorsReader
from tests.distributed.fsdp_toy import average_whole, shard_toy
from tests.distributed.toy import make_batches, make_toy
from tests.distributed.training_runs import GLOBAL_BATCH, STEPS, Case, _deepspeed, _full_weights, make_optimizer

RANK, ALPHA = 2, 4.0
PREFIX = "base_model.model."
HEAD = f"{PREFIX}head.modules_to_save.default."


@dataclass(frozen=True)
class LoraCase:
    method: str = "digrap"
    head: bool = False
    reference: str | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"strength_lr": 0.05})


def make_lora(head: bool) -> nn.Module:
    """Adapters on the blocks' linear layers, B not zero (so that ω has something to do); the head trains in full, or not."""
    model = make_toy()
    torch.manual_seed(3)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["up", "down"],
        modules_to_save=["head"] if head else None,
        init_lora_weights=False,
    )
    return get_peft_model(model, settings)  # type: ignore[arg-type]


def lora_loss(w: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The model's loss, from ``w``: trained and frozen tensors, by their names in the adapted model."""
    x, y = batch

    def adapted(name: str, x: torch.Tensor) -> torch.Tensor:
        full = PREFIX + name
        low = (x @ w[f"{full}.lora_A.default.weight"].T) @ w[f"{full}.lora_B.default.weight"].T
        return x @ w[f"{full}.base_layer.weight"].T + w[f"{full}.base_layer.bias"] + low * (ALPHA / RANK)

    embed = w[f"{PREFIX}embed.weight"]
    x = x @ embed.T
    for i in range(2):
        inner = torch.tanh(adapted(f"blocks.{i}.up", x))
        x = x + w[f"{PREFIX}blocks.{i}.gain"] * adapted(f"blocks.{i}.down", inner)
    x = torch.tanh((x @ w[f"{PREFIX}frozen.weight"].T + w[f"{PREFIX}frozen.bias"]) @ embed.T)
    head = HEAD if f"{HEAD}weight" in w else f"{PREFIX}head."
    return F.cross_entropy(x @ w[f"{head}weight"].T + w[f"{head}bias"], y)


def train_lora(way: Case, case: LoraCase) -> dict[str, Any]:
    """Thirty steps; what was trained, what was kept, and which tensors were read from files.

    Of ``way`` count backend, accumulation and how the backend is set up.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model: Any = make_lora(case.head)
    engine: Any = None
    optimizer: Any = None
    wrapped = model
    if way.backend == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    elif way.backend == "fsdp2":
        # Frozen and trained parameters share a block's all-gather; gradients are reduced of the trained ones alone.
        shard_toy(model, **way.fsdp)
    elif way.backend != "single":
        engine, wrapped = _deepspeed(model, way, world_size)
    if engine is None:
        optimizer = make_optimizer(model)
    read: list[str] = []
    opened: list[str] = []
    with Watched(read, opened):
        projector = digrap_scale.attach(
            engine or wrapped, optimizer, method=case.method, reference=case.reference, **case.options
        )
    for x, y in make_batches(STEPS, GLOBAL_BATCH):
        share = GLOBAL_BATCH // world_size
        micro = share // way.accumulation
        for start in range(rank * share, (rank + 1) * share, micro):
            part = slice(start, start + micro)
            loss = cross_entropy(wrapped(x[part]), y[part])
            if engine is not None:
                engine.backward(loss)
                engine.step()
            else:
                (loss / way.accumulation).backward()
        if engine is None:
            if way.backend == "fsdp2":
                average_whole(model)
            optimizer.step()
            optimizer.zero_grad()
    weights = _full_weights(model, engine)
    return {
        "weights": {name: weights[name] for name in trained_names(model)},
        "strength": projector.strength(),
        "rows": [spec.name for spec in projector.backend.specs],
        "held": sum(tensor.numel() for tensor in projector.held_tensors()),
        "share_of_head": sum(spec.numel for spec in projector.backend.specs if spec.name.startswith(HEAD)),
        "share": sum(spec.numel for spec in projector.backend.specs),
        "read": read,
        "opened": opened,
    }


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class Watched:
    """Notes every file that the reference's reader opens, and every tensor that it reads."""

    def __init__(self, read: list[str], opened: list[str]) -> None:
        self._read, self._opened = read, opened

    def __enter__(self) -> None:
        self._originals = SafetensorsReader.read, SafetensorsReader.__init__
        original_read, original_init = self._originals

        def read(reader: SafetensorsReader, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._read.append(name)
            return original_read(reader, name, *args, **kwargs)

        def init(reader: SafetensorsReader, path: Any) -> None:
            self._opened.append(str(path))
            original_init(reader, path)

        SafetensorsReader.read, SafetensorsReader.__init__ = read, init  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        SafetensorsReader.read, SafetensorsReader.__init__ = self._originals  # type: ignore[method-assign]


def train_all_lora(way: Case, cases: dict[str, LoraCase]) -> dict[str, Any]:
    return {key: train_lora(way, case) for key, case in cases.items()}
