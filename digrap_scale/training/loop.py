"""The training loop: everyone's loop, with one line more (``attach``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from digrap_scale.config.schema import Config
from digrap_scale.data.loader import TrainingLoader
from digrap_scale.data.tasks.base import Task
from digrap_scale.errors import NonFiniteError
from digrap_scale.projector import Projector
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.batches import data_counters, forwards
from digrap_scale.training.clock import StepClock, peak_memory_bytes
from digrap_scale.training.faults import Nobody
from digrap_scale.training.log import RunLog
from digrap_scale.training.schedule import LearningRate
from digrap_scale.training.setup import Place
from digrap_scale.types import Batch


class BetweenSteps(Protocol):
    """Who is told of steps: a ``Keeper``, or the stop-watch of a dry run."""

    @property
    def watch(self) -> Nobody:
        """Is told what this rank does."""

    def after_step(self, step: int) -> None:
        """Called after every step; what it raises ends the loop."""


def train_steps(
    engine: Engine,
    projector: Projector,
    task: Task,
    batches: TrainingLoader,
    log: RunLog,
    config: Config,
    place: Place,
    total_steps: int,
    keeper: BetweenSteps,
    start_step: int = 0,
    step_done: Callable[[], None] = lambda: None,
) -> None:
    """Take optimizer steps up to ``total_steps``; ``batches`` never ends and yields micro-batches of this rank.

    ``step_done`` is called after each step (a profiler's).

    Raises:
        Preempted, SaveError: see ``Keeper.after_step``.
        NonFiniteError: ``training.max_skipped_steps`` steps in a row had a gradient that is not finite.
    """
    schedule = LearningRate(engine.optimizer, config.schedule, total_steps, config.method)
    stream = iter(batches)
    cut = partial(forwards, task=task, config=config, place=place)
    clock = StepClock(engine.device)
    engine.model.train()
    skipped_in_a_row = 0
    for step in range(start_step + 1, total_steps + 1):
        learning_rate = schedule.set(step - 1)
        if step - 1 == schedule.probe_steps > 0:
            log.message(
                f"step {step}: the probe is over; from here on everything trains, and the optimizer starts anew"
            )
        clock.start_step(log.due(step))
        loss = accumulate(engine, projector, task, stream, partial(keeper.watch.at, step), cut, clock)
        keeper.watch.at(step, "optimizer step")
        seen = projector.report.step
        with clock.part("optimizer"):
            engine.step()
        if engine.skips_steps and projector.report.step == seen:
            projector.note_engine_skip()
        report = projector.report
        log.advance(step, samples=config.training.global_batch_samples, skipped=report.skipped)
        if report.skipped:
            skipped_in_a_row += 1
            log.message(_skip_line(step, report.nonfinite_layers))
            if skipped_in_a_row >= config.training.max_skipped_steps:
                error = NonFiniteError(
                    f"step {step}: {skipped_in_a_row} steps in a row had a gradient that is not finite, the last in "
                    f"{report.nonfinite_layers[0]}; lower optimizer.learning_rate or set training.max_grad_norm"
                )
                error.agreed = True
                raise error
        else:
            skipped_in_a_row = 0
        if log.due(step):
            place.sum_(loss)
            log.metrics(
                step,
                loss=float(loss) / place.world_size,
                learning_rate=learning_rate,
                grad_norm=report.grad_norm,
                strength_mean=report.strength_mean,
                conflict_rate=report.conflict_rate,
                counters={
                    **data_counters(batches, config, place),
                    "seconds": clock.take(),
                    "peak_memory_bytes": place.largest(peak_memory_bytes(engine.device)),
                },
            )
        if projector.method.has_strength and log.strength_due(step):
            log.strength(step, projector.strength())
        if log.layers_due(step):
            log.layers(step, projector.layers.take())
        step_done()
        keeper.after_step(step)


def accumulate(
    engine: Engine,
    projector: Projector,
    task: Task,
    stream: Iterator[Batch],
    tell: Callable[[str], None] = lambda _: None,
    cut: Callable[[Batch], list[tuple[Batch, float]]] = lambda batch: [(batch, 1.0)],
    clock: StepClock | None = None,
) -> torch.Tensor:
    """Forward and backward of one step's micro-batches. Returns this rank's mean loss, a detached float32 scalar.

    Args:
        tell: is told what this rank is about to do.
        cut: micro-batch → the forwards that it takes, and each one's share of its loss; see ``batches.forwards``.
        clock: measures the parts.
    """
    clock = clock or StepClock(engine.device)
    total = torch.zeros((), device=engine.device)
    for part in range(engine.accumulation_steps):
        tell("data")
        with clock.part("data"):
            pieces = cut(next(stream))
        tell("forward and backward")
        for number, (batch, share) in enumerate(pieces):
            batch = prepared(engine, batch)
            last = part == engine.accumulation_steps - 1 and number == len(pieces) - 1
            projector.expect_step(last)
            with engine.micro_step(last=last):
                with clock.part("forward"):
                    loss = task.loss(engine.model, batch) * share
                with clock.part("backward"):
                    engine.backward(loss)
            total += loss.detach().float()
    return total / engine.accumulation_steps


def prepared(engine: Engine, batch: Batch) -> Batch:
    """The batch on the engine's device, floating inputs in the dtype that it computes in."""
    batch = batch.to(engine.device)
    return replace(batch, inputs={name: engine.cast(tensor) for name, tensor in batch.inputs.items()})


def _skip_line(step: int, layers: list[str]) -> str:
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    return f"step {step} skipped on all ranks: the gradient of {layers[0]}{more} is not finite"
