"""Bytes of one rank's states, by each backend's own rules; held against what real runs hold by tests/planning.

Device and host are told apart: what offloading, or ``reference.placement``, keeps in host memory is not on the accelerator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from digrap_scale.config import Config
from digrap_scale.method.build import METHODS
from digrap_scale.planning.shards import flat_parts, flat_size, pieces_of, rows_of
from digrap_scale.planning.weights import ROOT_BLOCK, PlannedModel, Weight, compute_bytes, model_bytes, stepped_bytes
from digrap_scale.sharding.deepspeed_json import doubles_buckets, zero_sizes

# Rows of the table, in its order. "gathered": weights and gradients that are whole for a while (FSDP2, ZeRO-3).
KINDS = ("weights", "gradients", "optimizer", "reference", "previous", "buffers", "gathered", "activations")
STATES = KINDS[:6]
# DeepSpeed's defaults (zero_optimization.stage3_*).
_MAX_LIVE_ELEMENTS = 1_000_000_000
_STEP_BYTES = 4  # Adam's count, one a tensor
_ALIGNMENT = 64  # of a layer in the buffer of a streamed reference


@dataclass
class Memory:
    """One rank's bytes by kind (``KINDS``).

    Attributes:
        device: beside the computation.
        host: in host memory, where that is another.
        step: of ``device``, what is there only while the optimizer steps; ``activations`` and ``gathered`` are not, then.
    """

    device: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    step: int = 0

    @property
    def states(self) -> int:
        """What stays on the device from step to step, and gradients."""
        return sum(self.device[kind] for kind in STATES)

    @property
    def peak(self) -> int:
        """The larger of backward's and the optimizer step's."""
        return self.states + max(self.device["gathered"] + self.device["activations"], self.step)


def memory_of(model: PlannedModel, config: Config, world_size: int, rank: int, activation_bytes: int = 0) -> Memory:
    """The bytes of ``rank``, one of ``world_size``.

    Args:
        model: see ``read_model``; of this very config (its reference depends on the backend).
        config: the run.
        world_size, rank: of the job.
        activation_bytes: of one micro-batch's forward, on the device.
    """
    backend = config.sharding.backend
    memory = Memory()
    memory.device["buffers"] += model.buffer_bytes
    memory.device["activations"] = activation_bytes
    if backend in ("single", "ddp"):
        real = {weight.name: weight.numel for weight in model.trained}
        _whole(memory, model, config)
    elif backend == "fsdp2":
        ranks = world_size // config.sharding.replicas
        place = rank % ranks
        real = {weight.name: rows_of(weight, ranks, place).real for weight in model.trained}
        _fsdp2(memory, model, config, ranks, place)
    elif backend == "zero3":
        real = {weight.name: pieces_of(weight, world_size, rank).real for weight in model.trained}
        _zero3(memory, model, config, world_size)
    else:
        real = {
            weight.name: part
            for group in groups_of(model)
            for weight, part in zip(group, flat_parts(group, world_size, rank), strict=True)
        }
        _zero12(memory, model, config, world_size, real)
    _method(memory, model, config, real)
    return memory


def groups_of(model: PlannedModel) -> list[list[Weight]]:
    """The weights of each parameter group, in the model's order."""
    found: dict[int, list[Weight]] = {}
    for weight in model.trained:
        found.setdefault(weight.group, []).append(weight)
    return [found[number] for number in sorted(found)]


def moments(config: Config) -> int:
    """How many tensors of a weight's size its optimizer keeps."""
    if config.optimizer.name == "sgd":
        return int(config.optimizer.momentum > 0)
    return 2


def _steps(config: Config, tensors: int) -> int:
    return 0 if config.optimizer.name == "sgd" else _STEP_BYTES * tensors


def _whole(memory: Memory, model: PlannedModel, config: Config) -> None:
    width = model_bytes(config)
    trained = sum(weight.numel for weight in model.trained)
    memory.device["weights"] += width * sum(weight.numel for weight in model.weights)
    memory.device["gradients"] += width * trained
    memory.device["optimizer"] += moments(config) * width * trained + _steps(config, len(model.trained))
    if config.sharding.backend == "ddp":
        memory.device["buffers"] += width * trained  # the reducer's buckets


def _fsdp2(memory: Memory, model: PlannedModel, config: Config, ranks: int, rank: int) -> None:
    width, compute = model_bytes(config), compute_bytes(config)
    home = memory.host if config.sharding.offload == "cpu" else memory.device
    for weight in model.weights:
        held = rows_of(weight, ranks, rank)
        at = home if weight.shape else memory.device
        at["weights"] += width * held.padded
        if weight.trained:
            at["gradients"] += width * held.padded
            at["optimizer"] += moments(config) * width * held.real + _steps(config, 1)
    # One block computes while the next one's weights come; backward holds one block's gradients, whole and on their way.
    whole: Counter[int] = Counter()
    trained: Counter[int] = Counter()
    for weight in model.weights:
        if weight.shape:
            numel = rows_of(weight, ranks, 0).padded * ranks
            whole[weight.block] += numel
            trained[weight.block] += numel * weight.trained
    sizes = sorted(whole.values(), reverse=True)
    at_once = sum(sizes[:2]) if config.sharding.reshard_after_forward else sum(sizes)
    largest = max(trained.values(), default=0)
    memory.device["gathered"] += compute * at_once + (compute + 4) * largest  # summed over ranks in float32


def _zero12(memory: Memory, model: PlannedModel, config: Config, ranks: int, real: dict[str, int]) -> None:
    compute = compute_bytes(config)
    masters = memory.host if config.sharding.offload == "cpu" else memory.device
    sizes = [flat_size(group, ranks) for group in groups_of(model)]
    part = sum(sizes) // ranks
    memory.device["weights"] += compute * (sum(sizes) + sum(weight.numel for weight in model.frozen))
    masters["weights"] += 4 * part
    masters["optimizer"] += moments(config) * 4 * part + _steps(config, len(sizes))
    _zero_gradients(memory, model, config, part, real)


def reduced_bytes(config: Config) -> int:
    """Bytes an element of the gradients that ZeRO sums over ranks: half precision's are summed in float32."""
    return compute_bytes(config) if config.sharding.mixed_precision == "none" else 4


def _zero_gradients(memory: Memory, model: PlannedModel, config: Config, part: int, real: dict[str, int]) -> None:
    compute = compute_bytes(config)
    buckets = 2 if doubles_buckets(config) else 1
    memory.device["buffers"] += compute * buckets * zero_sizes(config).reduce_bucket_elements
    whole = sum(weight.numel for weight in model.trained)
    if config.sharding.offload == "cpu":
        # Each goes to host memory as it comes, by buffers of the largest one's size on both sides.
        largest = max(weight.numel for weight in model.trained)
        memory.device["buffers"] += compute * largest
        memory.device["gradients"] += compute * largest
        memory.host["buffers"] += compute * (largest + part)  # part: new weights on their way back
        memory.host["gradients"] += 4 * part
        return
    # Stage 1 reduces when backward is over; stage 2 keeps the tensors that its part touches, the first and last whole.
    touched = sum(weight.numel for weight in model.trained if real[weight.name])
    memory.device["gradients"] += compute * (whole if config.sharding.backend == "zero1" else touched)
    memory.step = 4 * part


def _zero3(memory: Memory, model: PlannedModel, config: Config, ranks: int) -> None:
    compute, sizes = compute_bytes(config), zero_sizes(config)
    offloaded = config.sharding.offload == "cpu"
    masters = memory.host if offloaded else memory.device
    part = sum(pieces_of(weight, ranks, 0).padded for weight in model.trained)
    kept = sum(weight.numel for weight in model.weights if weight.numel <= sizes.persistence_threshold_elements)
    memory.device["weights"] += compute * sum(pieces_of(weight, ranks, 0).padded for weight in model.weights)
    memory.device["weights"] += compute * kept
    masters["weights"] += 4 * part  # a copy of their own in float32, too
    masters["optimizer"] += moments(config) * 4 * part + _steps(config, len(groups_of(model)))
    masters["gradients"] += compute * part
    memory.device["buffers"] += reduced_bytes(config) * sizes.reduce_bucket_elements
    if offloaded:
        memory.host["gradients"] += 4 * min(part, sizes.sub_group_elements)
    else:
        memory.step = 4 * min(part, sizes.sub_group_elements)
    others = sum(weight.numel for weight in model.weights) - kept
    memory.device["gathered"] += compute * min(others, _MAX_LIVE_ELEMENTS)


def _method(memory: Memory, model: PlannedModel, config: Config, real: dict[str, int]) -> None:
    """θ₀, and the weights before the last step (or FTP's directions)."""
    on_host = config.sharding.offload == "cpu"
    home = memory.host if on_host else memory.device
    placement = config.reference.placement
    if placement == "stream":
        widths = [-(-real[w.name] * w.reference_bytes // _ALIGNMENT) * _ALIGNMENT for w in model.trained]
        memory.host["reference"] += 2 * min(config.reference.buffer_bytes // 2, sum(widths))
    else:
        at = memory.host if placement == "cpu" else home
        at["reference"] += sum(real[weight.name] * weight.reference_bytes for weight in model.trained)
    if keeps_previous(config):
        width = stepped_bytes(config)
        home["previous"] += width * sum(real[weight.name] for weight in model.trained if weight.projected)


def keeps_previous(config: Config) -> bool:
    """Whether a method's memory of the last step is a tensor, not computed again from Adam's moments."""
    method = METHODS[config.method.name]
    if not method.needs_previous:
        return False
    can = not method.acts_on_update and config.optimizer.name != "sgd" and stepped_bytes(config) == 4
    return config.reference.previous == "stored" or not can


def ranks_to_look_at(world_size: int) -> Sequence[int]:
    """All ranks of a small job; the first and last of a large one, between which the others lie."""
    return range(world_size) if world_size <= 64 else (0, 1, world_size // 2, world_size - 2, world_size - 1)


def blocks_of(model: PlannedModel) -> dict[int, list[Weight]]:
    """Block → its weights that are sharded; ``ROOT_BLOCK`` is the root's."""
    found: dict[int, list[Weight]] = {ROOT_BLOCK: []}
    for weight in model.weights:
        if weight.shape:
            found.setdefault(weight.block, []).append(weight)
    return found
