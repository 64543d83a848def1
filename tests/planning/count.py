"""The collectives of a training step, counted as torch.distributed is called."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from digrap_scale.config import parse_config
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.setup import Place
from tests.planning.small_run import SIDE

Counted = dict[str, list[int]]  # collective → bytes of each call's whole tensor


class Counting(TorchDispatchMode):
    """Sees every collective, whoever calls it: all go through torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counted = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "c10d" and name in _PLACES:
            collective, place = _PLACES[name]
            whole = args[place]
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.found.setdefault(collective, []).append(size)
        return func(*args, **(kwargs or {}))


# torch's operator → its collective, and which argument is the whole tensor.
_PLACES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


def count_step(text: str) -> Counted:
    """The collectives of a config's second step, and of no other."""
    config = parse_config(text)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    run = build_run(config, Place(rank, ranks, torch.device("cpu")))
    engine = run.engine
    projector = attach_projector(run, config)
    counting = Counting()
    for _ in range(2):
        counting = Counting()
        with counting:
            for part in range(engine.accumulation_steps):
                pixels = engine.cast(torch.randn(engine.micro_batch_samples, 3, SIDE, SIDE))
                labels = torch.zeros(engine.micro_batch_samples, dtype=torch.int64)
                with engine.micro_step(last=part == engine.accumulation_steps - 1):
                    loss = torch.nn.functional.cross_entropy(engine.model(pixel_values=pixels).logits.float(), labels)
                    engine.backward(loss)
            engine.step()
    projector.detach()
    return counting.found


def count_all(texts: list[str]) -> list[Counted]:
    """``count_step`` of each config, one after the other."""
    return [count_step(text) for text in texts]
