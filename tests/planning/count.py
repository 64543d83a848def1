"""The collectives of a training step, counted as torch.distributed is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from digrap_scale.config import parse_config
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.setup import Place
from tests.planning.small_run import SIDE

Counted = dict[str, list[int]]  # collective → bytes of each call's whole tensor


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Function → its collective, and which argument is the whole tensor.
_FUNCTIONS: dict[str, tuple[str, int]] = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
}
_WORDS = {0: ("tensor", "output_tensor"), 1: ("input", "input_tensor")}


@contextmanager
def counted() -> Iterator[Counted]:
    """Calls of the block's time. What calls within a coalescing manager is called with the same tensors, and counted too."""
    found: Counted = {}

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        collective, place = _FUNCTIONS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            whole = args[place] if len(args) > place else next(kwargs[word] for word in _WORDS[place] if word in kwargs)
            found.setdefault(collective, []).append(_size(whole))
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in _FUNCTIONS:
            original = getattr(dist, name)
            stack.enter_context(patch.object(dist, name, watched(name, original)))
        yield found


def count_step(text: str) -> Counted:
    """The collectives of a config's second step."""
    config = parse_config(text)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    run = build_run(config, Place(rank, ranks, torch.device("cpu")))
    engine = run.engine
    projector = attach_projector(run, config)
    found: Counted = {}
    for _ in range(2):
        with counted() as found:
            for part in range(engine.accumulation_steps):
                pixels = engine.cast(torch.randn(engine.micro_batch_samples, 3, SIDE, SIDE))
                labels = torch.zeros(engine.micro_batch_samples, dtype=torch.int64)
                with engine.micro_step(last=part == engine.accumulation_steps - 1):
                    loss = torch.nn.functional.cross_entropy(engine.model(pixel_values=pixels).logits.float(), labels)
                    engine.backward(loss)
            engine.step()
    projector.detach()
    return found


def count_all(texts: list[str]) -> list[Counted]:
    """``count_step`` of each config, one after the other."""
    return [count_step(text) for text in texts]
