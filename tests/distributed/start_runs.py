"""A run's start on real ranks, both ways: each rank its slices of the file, and the whole model everywhere."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.config import Config
from digrap_scale.models.build import build_model
from digrap_scale.models.groups import build_groups
from digrap_scale.reference.initial import open_weights
from digrap_scale.sharding.build import build_engine
from digrap_scale.sharding.collectives import load_collectives
from digrap_scale.sharding.engine import Engine
from tests.models.tiny import make_config


def config_of(folder: str, task: str, sharding: dict[str, Any], **model: Any) -> Config:
    config = make_config(folder, task, **model)
    training = config.training.model_copy(update={"global_batch_samples": 12})
    return config.model_copy(update={"sharding": config.sharding.model_copy(update=sharding), "training": training})


def start(config: Config, classes: int | None, sliced: bool, momentum: float = 0.9) -> Engine:
    built = build_model(config, classes, open_weights if sliced else None)
    assert (built.slices is not None) == sliced
    return build_engine(
        built.model,
        lambda model: torch.optim.SGD(build_groups(model, config.optimizer), momentum=momentum),
        config,
        torch.device("cpu"),
        dist.get_world_size(),
        built.slices,
    )


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def start_both_ways(cases: dict[str, tuple[Config, int | None]]) -> dict[str, Any]:
    """What would be saved before and after a step with rate 1e-3, by case and way; on rank 0 at least."""
    return {name: {str(sliced): _step(*case, sliced) for sliced in (True, False)} for name, case in cases.items()}


def _step(config: Config, classes: int | None, sliced: bool) -> dict[str, Any]:
    engine = start(config, classes, sliced)
    before = copied(engine.full_state_dict())
    torch.manual_seed(dist.get_rank())
    engine.model.train()
    with engine.micro_step(last=True):
        inputs: dict[str, torch.Tensor] = {"pixel_values": engine.cast(torch.randn(2, 3, 16, 16))}
        if config.model.task == "contrastive":
            words = torch.tensor([[1, 4, 5, 2], [1, 6, 7, 2]])
            inputs |= {"input_ids": words, "attention_mask": torch.ones_like(words)}
            loss = engine.model(**inputs).logits_per_image.float().square().mean()
        else:
            loss = engine.model(**inputs, labels=torch.tensor([0, 1])).loss
        engine.backward(loss)
    engine.step()
    return {"before": before, "after": copied(engine.full_state_dict()), "loss": float(loss)}


class PrivateMemory:
    """The most memory of its own that this process has had inside, in bytes above what it had on entry.

    Files that are mapped and only read are not counted (they belong to the page cache); a page that is written is.
    """

    def __enter__(self) -> PrivateMemory:
        gc.collect()
        self._done = threading.Event()
        self.before = self.peak_total = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return self.peak_total - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak_total = max(self.peak_total, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon in /proc/self/status")


def measure(warm_up: list[Config], configs: dict[str, Config], ways: list[bool]) -> dict[str, Any]:
    """Of building and wrapping, by case and way: the peak of private memory, the one before DeepSpeed makes its own copies
    of the shards, and seconds. The first starts, which are not measured, import what is needed."""
    import deepspeed

    load_collectives(print)
    for config in warm_up:
        start(config, 3, sliced=True)
    found: dict[str, Any] = {}
    initialize = deepspeed.initialize
    for name, config in configs.items():
        for sliced in ways:
            gc.collect()
            dist.barrier()
            began = time.perf_counter()
            with PrivateMemory() as memory:
                sharded: list[int] = []

                def noted(*args: Any, memory: Any = memory, sharded: Any = sharded, **options: Any) -> Any:
                    sharded.append(memory.peak)
                    return initialize(*args, **options)

                deepspeed.initialize = noted
                engine = start(config, 3, sliced, momentum=0.0)
            seconds = time.perf_counter() - began
            deepspeed.initialize = initialize
            found[f"{name} {sliced}"] = {
                "peak": memory.peak,
                "sharded": (sharded or [memory.peak])[0],
                "seconds": seconds,
            }
            del engine
    return found
