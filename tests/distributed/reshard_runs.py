"""An awkward model on any backend: some steps, its checkpoint, and one step more; or the same from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.nn.functional import cross_entropy

import digrap_scale
from digrap_scale.checkpoint.layout import step_folder
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.resume import open_together
from digrap_scale.checkpoint.save import Saver
from digrap_scale.config import parse_config
from digrap_scale.sharding.build import build_engine
from digrap_scale.training.setup import Place
from digrap_scale.training.state import RunState
from tests.distributed.toy import Toy, make_batches, make_theta0
from tests.distributed.training_runs import make_optimizer

SAMPLES, STEPS = 36, 5


class Odd(Toy):
    """``Toy`` (tied, frozen, unused, one-element, uneven), a 0-d parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.shift


def make_odd() -> Odd:
    torch.manual_seed(0)
    return Odd()


class Run:
    """The model on ``backend``, attached, as ``training.run`` would have it."""

    def __init__(self, backend: str, method: str, folder: Path, **checkpoint: Any) -> None:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        wrap = {"wrap": ["Block"]} if backend == "fsdp2" else {}
        zero = {"zero": {"persistence_threshold_elements": 10, "sub_group_elements": 60}} if backend == "zero3" else {}
        self.config = parse_config(
            yaml.safe_dump(
                {
                    "run": {"folder": str(folder)},
                    "model": {"path": "odd", "task": "classification"},
                    "data": {"train": ["none.tar"], "classes": "none.json"},
                    "method": {"name": method, "strength_lr": 0.05} if method != "ftp" else {"name": "none"},
                    "reference": {"source": "zero"},
                    "optimizer": {"learning_rate": 1e-2},
                    "training": {"steps": STEPS + 1, "global_batch_samples": SAMPLES},
                    "sharding": {"backend": backend, **wrap, **zero},
                    "checkpoint": checkpoint,
                }
            )
        )
        model = make_odd()
        theta0 = make_theta0(model)
        self.place = Place(rank, size, torch.device("cpu"))
        self.engine = build_engine(model, make_optimizer, self.config, self.place.device, size)
        self.projector = digrap_scale.attach(
            *self.engine.attached_to,
            method=method,
            reference=theta0,
            **({"strength_lr": 0.05} if method != "ftp" else {"annealing": 0.5}),
        )
        built = SimpleNamespace(checkpoint_folder=Path("none"))
        run: Any = SimpleNamespace(engine=self.engine, built=built, model_class=Odd)
        self.state = RunState(run, self.projector, self.config, self.place, STEPS + 1)
        self.ranks = Ranks.of_job(60)

    def step(self, number: int) -> None:
        """Step ``number`` (0 is the first) of the run."""
        x, y = make_batches(number + 1, SAMPLES)[number]
        share = SAMPLES // self.place.world_size
        part = slice(self.place.rank * share, (self.place.rank + 1) * share)
        with self.engine.micro_step(last=True):
            self.engine.backward(cross_entropy(self.engine.model(self.engine.cast(x[part])).float(), y[part]))
        self.engine.step()

    def save(self, step: int) -> None:
        """A checkpoint, without the small files of a Hugging Face model."""
        saver = Saver(Path(self.config.run.folder), self.config.checkpoint, self.ranks, lambda _: None)
        saver.save(replace(self.state.contents(step, {}), write_model=lambda _: None))
        saver.close()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self.state.load(open_together(folder, self.ranks), self.ranks, lambda _: None)


def first(backend: str, method: str, folder: str) -> None:
    """Steps from the start; saved after ``STEPS``, and after one more."""
    run = Run(backend, method, Path(folder))
    for number in range(STEPS):
        run.step(number)
    run.save(STEPS)
    run.step(STEPS)
    run.save(STEPS + 1)
    run.projector.detach()


def second(backend: str, method: str, source: str, folder: str) -> None:
    """From ``source``'s checkpoint; saved again as it was loaded, and after one step more."""
    run = Run(backend, method, Path(folder))
    run.load(step_folder(Path(source), STEPS))
    run.save(STEPS)
    run.step(STEPS)
    run.save(STEPS + 1)
    run.projector.detach()


def native(backend: str, folder: str) -> None:
    """Saved with DeepSpeed's own checkpoint beside ours, changed by a step, loaded back by DeepSpeed, saved again."""
    run = Run(backend, "digrap", Path(folder), deepspeed_native=True)
    for number in range(STEPS):
        run.step(number)
    run.save(STEPS)
    run.step(STEPS)
    loaded, _ = run.engine.model.load_checkpoint(str(step_folder(Path(folder), STEPS) / "deepspeed"), tag="engine")
    assert loaded is not None
    run.projector.backend.weights_changed()
    run.save(STEPS + 1)
    run.projector.detach()


def firsts(cases: dict[str, tuple[str, ...]]) -> None:
    """``first`` of every case, in the same processes."""
    for arguments in cases.values():
        first(*arguments)


def seconds(cases: dict[str, tuple[str, ...]]) -> None:
    """``second`` of every case, in the same processes."""
    for arguments in cases.values():
        second(*arguments)
