"""What crosses ranks in one optimizer step, by collective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from digrap_scale.config import Config
from digrap_scale.method.build import METHODS
from digrap_scale.method.statistics import GRADIENT_STATISTICS, UPDATE_STATISTICS
from digrap_scale.planning.shards import rows_of
from digrap_scale.planning.states import blocks_of, groups_of, reduced_bytes
from digrap_scale.planning.weights import ROOT_BLOCK, PlannedModel, compute_bytes, model_bytes
from digrap_scale.sharding.deepspeed_json import zero_sizes

_DDP_BUCKET_BYTES = 25 << 20  # torch's default; the first is smaller
_EDGE_BYTES = 40  # FTP: of each layer, what a rank tells of the rows at its shard's two ends


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step.

    Attributes:
        collective: its name in torch.distributed.
        what: what it carries.
        count: how often it is called in a step.
        payload_bytes: of all calls together: the whole tensor's bytes, not a rank's share.
        ranks: in its group.
    """

    collective: str
    what: str
    count: int
    payload_bytes: int
    ranks: int

    @property
    def sent_bytes(self) -> int:
        """What one rank sends with the ring algorithm (Patarasuk and Yuan 2009): (n − 1) / n of the payload, twice for an
        all-reduce."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return rounds * self.payload_bytes * (self.ranks - 1) // self.ranks


def traffic_of(model: PlannedModel, config: Config, world_size: int, accumulation_steps: int) -> list[Traffic]:
    """The collectives of one step of ``accumulation_steps`` micro-batches; none within one process.

    What every backend adds: one float (the loss) in steps that are logged, one number a step (whether to stop).
    """
    if world_size == 1:
        return []
    backend = config.sharding.backend
    if backend == "ddp":
        found = list(_ddp(model, config, world_size))
    elif backend == "fsdp2":
        found = list(_fsdp2(model, config, world_size, accumulation_steps))
    elif backend == "zero3":
        found = list(_zero3(model, config, world_size, accumulation_steps))
    elif backend == "single":
        return []
    else:
        found = list(_zero12(model, config, world_size, accumulation_steps))
    return [one for one in found if one.payload_bytes and one.ranks > 1]


def _ddp(model: PlannedModel, config: Config, ranks: int) -> Iterator[Traffic]:
    size = model_bytes(config) * sum(weight.numel for weight in model.trained)
    yield Traffic("all_reduce", "gradients, in buckets of 25 MiB", math.ceil(size / _DDP_BUCKET_BYTES), size, ranks)


def _fsdp2(model: PlannedModel, config: Config, world_size: int, accumulation_steps: int) -> Iterator[Traffic]:
    replicas = config.sharding.replicas
    ranks = world_size // replicas
    compute = compute_bytes(config)
    sent = 4  # summed over ranks in float32
    blocks = [block for block in blocks_of(model).values() if block]
    trained = [block for block in blocks if any(weight.trained for weight in block)]
    whole = sum(rows_of(weight, ranks, 0).padded * ranks for block in blocks for weight in block)
    grads = sum(rows_of(w, ranks, 0).padded * ranks for block in trained for w in block if w.trained)
    # Backward asks for the weights of every block from the first that trains on, and ahead of time for those of the one before
    # it. (At most: of towers side by side, one that does not train at all is not asked for.)
    called = [block for number, block in blocks_of(model).items() if block and number != ROOT_BLOCK]
    called += [block for block in [blocks_of(model)[ROOT_BLOCK]] if block]
    first = next((place for place, block in enumerate(called) if any(weight.trained for weight in block)), len(called))
    backward = called[max(0, first - 1) :]
    again = sum(rows_of(weight, ranks, 0).padded * ranks for block in backward for weight in block)
    yield Traffic(
        "all_gather", "weights, forward", len(blocks) * accumulation_steps, compute * whole * accumulation_steps, ranks
    )
    if config.sharding.reshard_after_forward:
        yield Traffic(
            "all_gather", "weights, backward", len(backward) * accumulation_steps,
            compute * again * accumulation_steps, ranks,
        )  # fmt: skip
    yield Traffic(
        "reduce_scatter", "gradients", len(trained) * accumulation_steps, sent * grads * accumulation_steps, ranks
    )
    yield Traffic("all_reduce", "gradients over replicas", len(trained), sent * grads // ranks, replicas)
    scalars = sum(not weight.shape for weight in model.trained)
    yield Traffic("all_reduce", "gradients of 0-d weights", 1, model_bytes(config) * scalars, world_size)
    yield from _method(model, config, ranks, 1)


def _buckets(model: PlannedModel, config: Config) -> int:
    size = zero_sizes(config).reduce_bucket_elements
    return max(1, math.ceil(sum(weight.numel for weight in model.trained) / size))


def _zero12(model: PlannedModel, config: Config, ranks: int, accumulation_steps: int) -> Iterator[Traffic]:
    numel = sum(weight.numel for weight in model.trained)
    times = accumulation_steps if config.sharding.backend == "zero2" else 1
    buckets = _buckets(model, config) * times
    yield Traffic("all_reduce", "gradients, in buckets", buckets, reduced_bytes(config) * numel * times, ranks)
    yield Traffic(
        "all_gather", "weights after the step", len(groups_of(model)), compute_bytes(config) * numel, ranks
    )  # fmt: skip
    yield from _method(model, config, ranks, len(groups_of(model)))


def _zero3(model: PlannedModel, config: Config, ranks: int, accumulation_steps: int) -> Iterator[Traffic]:
    sizes, compute = zero_sizes(config), compute_bytes(config)
    small = sizes.persistence_threshold_elements
    large = [weight for weight in model.weights if weight.numel > small]
    trained = sum(weight.numel for weight in model.trained)
    numel = sum(weight.numel for weight in large)
    kept = [weight for weight in model.trained if weight.numel <= small]
    # What is live at the end of forward is gathered again only beyond max_live_parameters; the plan counts both.
    yield Traffic(
        "all_gather", "weights, forward and backward (at most)", 2 * len(large) * accumulation_steps,
        2 * compute * numel * accumulation_steps, ranks,
    )  # fmt: skip
    yield Traffic(
        "reduce_scatter", "gradients, in buckets", _buckets(model, config) * accumulation_steps,
        reduced_bytes(config) * trained * accumulation_steps, ranks,
    )  # fmt: skip
    yield Traffic(
        "all_gather", "small weights after the step", 1, compute * sum(weight.numel for weight in kept), ranks
    )  # fmt: skip
    sub_groups = sum(
        max(1, math.ceil(sum(w.numel for w in group) / sizes.sub_group_elements)) for group in groups_of(model)
    )
    yield from _method(model, config, ranks, sub_groups)


def _method(model: PlannedModel, config: Config, ranks: int, steps: int) -> Iterator[Traffic]:
    """The projector's own: see ``Projector``; the inner optimizer steps ``steps`` times (ZeRO's groups)."""
    method, layers = METHODS[config.method.name], len(model.trained)
    yield Traffic("all_reduce", "the method's statistics", 1, 8 * GRADIENT_STATISTICS * layers, ranks)
    if method.acts_on_update and config.method.name == "ftp":
        yield Traffic("all_gather", "rows cut by shards", steps, _EDGE_BYTES * layers * ranks, ranks)
    elif method.acts_on_update:
        yield Traffic("all_reduce", "statistics of the update", steps, 8 * UPDATE_STATISTICS * layers, ranks)
