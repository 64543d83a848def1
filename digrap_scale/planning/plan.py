"""A run's plan: its memory, its communication, and how other placements and backends would do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from digrap_scale.config import Config
from digrap_scale.data.classes import load_classes
from digrap_scale.errors import ConfigError
from digrap_scale.planning.activations import activation_bytes
from digrap_scale.planning.states import Memory, memory_of, ranks_to_look_at
from digrap_scale.planning.traffic import Traffic, traffic_of
from digrap_scale.planning.weights import PlannedModel, read_model
from digrap_scale.sharding.engine import portions

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
_PLACEMENTS = ("device", "cpu", "stream")


@dataclass(frozen=True)
class Plan:
    """What a config needs on each rank.

    Attributes:
        model: what it trains.
        memory: rank → its bytes, of the ranks looked at.
        traffic: of a step.
        micro_batch_samples, accumulation_steps: of a rank.
        notes: what was assumed.
    """

    model: PlannedModel
    memory: dict[int, Memory]
    traffic: list[Traffic]
    micro_batch_samples: int
    accumulation_steps: int
    notes: list[str]

    @property
    def largest(self) -> tuple[int, Memory]:
        """The rank that needs most on its device."""
        return max(self.memory.items(), key=lambda item: item[1].peak)


@dataclass(frozen=True)
class Alternative:
    """The same run with another backend, offload or placement of the reference.

    Attributes:
        backend, offload, placement: the config's words.
        memory: of the rank that needs most.
        sent_bytes: what a rank sends in a step.
        chosen: whether it is the config's own.
    """

    backend: str
    offload: str
    placement: str
    memory: Memory
    sent_bytes: int
    chosen: bool


def parse_bytes(text: str, option: str = "--device-memory") -> int:
    """``80GiB``, ``80GB``, ``80G`` (binary), ``1.5TiB`` or a plain number of bytes.

    Raises:
        ConfigError: anything else, or nothing above 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ConfigError(f"{option}: expected bytes such as 80GiB, found {text!r}")
    return int(float(match[1]) * unit)


def num_classes_of(config: Config) -> int | None:
    """How many classes ``data.classes`` lists, or None."""
    return None if config.data.classes is None else len(load_classes(config.data.classes).names)


def plan(config: Config, world_size: int) -> Plan:
    """What ``config`` needs on ``world_size`` ranks; downloads nothing but the model's config.json.

    Raises:
        ConfigError: no such model, or batches, replicas or a backend that do not go with so many ranks.
    """
    check_ranks(config, world_size)
    micro, accumulation_steps = portions(config.training, world_size)
    num_classes = num_classes_of(config)
    model = read_model(config, num_classes)
    activations, how = activation_bytes(model, config, micro, num_classes)
    memory = {
        rank: memory_of(model, config, world_size, rank, activations) for rank in sorted(ranks_to_look_at(world_size))
    }
    traffic = traffic_of(model, config, world_size, accumulation_steps)
    return Plan(model, memory, traffic, micro, accumulation_steps, [*model.notes, how])


def alternatives(config: Config, world_size: int) -> list[Alternative]:
    """Every backend, offload and placement of the reference that goes with the config, least memory on the device first."""
    _, accumulation_steps = portions(config.training, world_size)
    num_classes = num_classes_of(config)
    activations: dict[str, int] = {}
    found = []
    for other in _variants(config, world_size):
        model = read_model(other, num_classes)
        kind = "wrapped" if other.sharding.backend not in ("single", "ddp") else "autocast"
        if kind not in activations:
            micro, _ = portions(other.training, world_size)
            activations[kind] = activation_bytes(model, other, micro, num_classes)[0]
        ranks = ranks_to_look_at(world_size)
        memory = max(
            (memory_of(model, other, world_size, rank, activations[kind]) for rank in ranks), key=lambda one: one.peak
        )
        sent = sum(one.sent_bytes for one in traffic_of(model, other, world_size, accumulation_steps))
        words = (other.sharding.backend, other.sharding.offload, other.reference.placement)
        own = (config.sharding.backend, config.sharding.offload, config.reference.placement)
        found.append(Alternative(*words, memory, sent, words == own))
    return sorted(found, key=lambda one: (one.memory.peak, one.sent_bytes))


def _variants(config: Config, world_size: int) -> Iterator[Config]:
    backends = ("single", *_BACKENDS) if world_size == 1 else _BACKENDS
    for backend in backends:
        for offload in ("none", "cpu"):
            for placement in _PLACEMENTS:
                values = config.model_dump()
                sharding = values["sharding"]
                if backend != config.sharding.backend:
                    # What only the config's own backend takes does not go along.
                    sharding |= {"wrap": sharding["wrap"] if backend == "fsdp2" else []}
                    sharding |= {"reshard_after_forward": True, "replicas": 1}
                    if not backend.startswith("zero") or not config.sharding.backend.startswith("zero"):
                        sharding["zero"] = None
                    elif sharding["zero"] is not None:
                        sharding["zero"] = {"reduce_bucket_elements": sharding["zero"]["reduce_bucket_elements"]}
                    sharding["deepspeed_config"] = None
                    values["checkpoint"]["deepspeed_native"] = False
                sharding |= {"backend": backend, "offload": offload}
                values["reference"]["placement"] = placement
                if placement != "stream":
                    values["reference"]["buffer_bytes"] = 256 << 20
                try:
                    yield Config.model_validate(values)
                except ValidationError:
                    continue  # rules over several keys forbid it: the run would, too


def check_ranks(config: Config, world_size: int) -> None:
    """Raises: ConfigError: the config does not go with so many processes."""
    if world_size < 1:
        raise ConfigError(f"--world-size: expected 1 or more, found {world_size}")
    if config.sharding.backend == "single" and world_size > 1:
        raise ConfigError(
            f"sharding.backend: single runs one process, found --world-size {world_size}; set fsdp2, zero1, zero2, zero3 or ddp"
        )
    if world_size % config.sharding.replicas:
        raise ConfigError(
            f"sharding.replicas: expected a divisor of the number of processes ({world_size}), found {config.sharding.replicas}"
        )
