"""Runs built as training builds them, and the bytes that their objects really hold on a rank."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from digrap_scale.config import Config, parse_config
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.setup import Place
from tests.planning.small_run import SIDE


def stored(tensors: Iterable[Any]) -> dict[int, int]:
    """Address of a storage → its bytes; views of one storage count once."""
    found = {}
    for tensor in tensors:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if not local.is_meta and local.untyped_storage().nbytes():
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


def everything() -> dict[int, int]:
    """All tensors of this process that Python can see."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc shows deprecated objects that warn when they are looked at
        return stored(t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t) is not DTensor)


def measure_all(texts: list[str]) -> list[dict[str, int]]:
    """``measure`` of each config, one after the other."""
    return [measure(parse_config(text)) for text in texts]


def measure(config: Config) -> dict[str, int]:
    """Bytes by kind after two training steps; ``all``: every tensor that is there when the second backward is over."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    before = everything()
    run = build_run(config, Place(rank, ranks, torch.device("cpu")))
    engine = run.engine
    projector = attach_projector(run, config)
    at_backward: dict[int, int] = {}
    for _ in range(2):
        pixels = engine.cast(torch.randn(engine.micro_batch_samples, 3, SIDE, SIDE))
        labels = torch.zeros(engine.micro_batch_samples, dtype=torch.int64)
        with engine.micro_step(last=True):
            loss = torch.nn.functional.cross_entropy(engine.model(pixel_values=pixels).logits.float(), labels)
            engine.backward(loss)
        del loss, pixels
        at_backward = everything()
        engine.step()
    backend = projector.backend
    kept = projector._previous
    state = [t for s in backend.hooked[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    weights = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    weights += [*engine.module.parameters(), *backend.weights()]
    found = {
        "weights": stored(weights),
        "optimizer": stored(state),
        "reference": stored(projector._reference.held_tensors()),
        "previous": stored([] if kept is None else kept.held_tensors()),
        "all": {address: size for address, size in at_backward.items() if address not in before},
    }
    projector.detach()
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}
