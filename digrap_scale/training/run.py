"""A run from its config to its folder: build, attach, train, save, evaluate."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from digrap_scale.checkpoint.atomic import atomic_folder, write_file
from digrap_scale.config import Config, dump_config
from digrap_scale.data.loader import build_loader
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.tasks.base import Task
from digrap_scale.data.tasks.build import build_task, required_classes
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.report import ReportRow, print_report, write_report
from digrap_scale.evaluation.strength import read_strength
from digrap_scale.evaluation.suite import SuiteResult, evaluate_suite
from digrap_scale.method.build import from_config
from digrap_scale.models.adapters import load_adapter
from digrap_scale.models.build import BuiltModel, build_model
from digrap_scale.models.groups import build_groups, describe_groups
from digrap_scale.projector import Projector, attach
from digrap_scale.reference.initial import open_weights
from digrap_scale.sharding.build import build_engine
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.log import RunLog, read_status
from digrap_scale.training.loop import prepared, train_steps
from digrap_scale.training.setup import Place, peer_errors, place, seed_everything
from digrap_scale.training.validate import find_problems
from digrap_scale.types import Batch


def train(config: Config) -> None:
    """Run ``config`` from start to end, on every rank of the job.

    Raises:
        ConfigError, CheckpointError, SaveError, PeerError, NonFiniteError: see each; the message is for the user.
    """
    with place(config) as here:
        _train(config, here)


def _train(config: Config, here: Place) -> None:
    folder = Path(config.run.folder)
    here.on_rank_0(lambda: _prepare(folder, config))
    shards = ShardSet.open(config.data.train)
    here.same("data.train: samples of the shards", shards.counts)
    total_steps = count_steps(config, shards.samples)
    with (
        RunLog(
            folder,
            rank=here.rank,
            total_steps=total_steps,
            tensorboard=config.logging.tensorboard,
            every_steps=config.logging.every_steps,
            strength_every_steps=config.logging.strength_every_steps,
        ) as log,
        peer_errors(),
    ):
        run = _build(config, here)
        groups = build_groups(run.engine.module, config.optimizer)
        for line in run.built.report + describe_groups(groups):
            log.message(line)
        projector = _attach(run, config)
        log.message(projector.summary())
        train_task = build_task(config, run.built.processor, run.built.tokenizer, train=True)
        batches = build_loader(
            shards,
            train_task,
            batch_samples=run.engine.micro_batch_samples,
            rank=here.rank,
            world_size=here.world_size,
            workers=config.data.workers,
            seed=config.run.seed,
            shuffle_buffer_samples=config.data.shuffle_buffer_samples,
            train=True,
        )
        train_steps(run.engine, projector, train_task, batches, log, config, here, total_steps)
        projector.detach()
        if config.checkpoint.final:
            save_final(run, folder / "final", here)
            log.message(f"weights: {folder / 'final'}")
        if config.evaluation.at_end and config.evaluation.suite:
            result = _evaluate(run, config, here)
            here.on_rank_0(lambda: _report(config, folder, result))


def evaluate(config: Config, weights: str | None = None, *, show: bool = True) -> SuiteResult:
    """The suite's table for ``model.path``, or for the weights in folder ``weights`` (a run's ``final/``).

    Written to ``run.folder``/evaluation, and printed if ``show``; returns the result on every rank.

    Raises:
        ConfigError: the config has no suite; see ``train`` for the others.
    """
    if not config.evaluation.suite:
        raise ConfigError("evaluation.suite: expected at least one test set, found none")
    adapter = Path(weights) if weights is not None and config.model.lora is not None else None
    if weights is not None and adapter is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": weights})})
    with place(config) as here:
        here.on_rank_0(lambda: _refuse(find_problems(config)))
        result = _evaluate(_build(config, here, adapter), config, here)
        if here.rank == 0:
            rows = [ReportRow(weights or config.model.path, result)]
            write_report(rows, Path(config.run.folder) / "evaluation", notes=[])
            if show:
                print_report(rows)
        return result


@dataclass
class _Run:
    """A model that is built and wrapped."""

    built: BuiltModel
    engine: Engine
    model_class: type[nn.Module]
    task: Task | None


def count_steps(config: Config, samples: int) -> int:
    """Optimizer steps of the run: ``training.steps``, or full global batches of ``training.epochs`` passes."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, training.epochs * (samples // training.global_batch_samples))


def _build(config: Config, here: Place, adapter: Path | None = None) -> _Run:
    classes = required_classes(config) if config.data.classes is not None else None
    built = build_model(config, len(classes.names) if classes is not None else None, open_weights)
    if adapter is not None:
        load_adapter(built.model, adapter)
    model_class = type(built.model)
    engine = build_engine(
        built.model, lambda model: make_optimizer(model, config), config, here.device, here.world_size, built.slices
    )
    seed_everything(config.run.seed, here.rank)
    task = build_task(config, built.processor, built.tokenizer, train=False) if classes is not None else None
    return _Run(built, engine, model_class, task)


def make_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """torch's optimizer of the config's name, over the config's parameter groups; fused where the device has it."""
    options = config.optimizer
    groups = build_groups(model, options)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)
    cls = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return cls(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def _attach(run: _Run, config: Config) -> Projector:
    model, optimizer = run.engine.attached_to
    source = config.reference.source
    method = from_config(config.method)
    reference: str | Path | None = run.built.checkpoint_folder if source == "pretrained" else source
    if config.model.lora is not None and source == "pretrained" and not config.model.lora.modules_to_save:
        reference = None  # adapters only: their reference is zero, the base's is not needed
    new = run.built.new_parameters if method.uses_reference else set()  # all of them train: build_model sees to it
    return attach(
        model,
        optimizer,
        method=method,
        reference=reference,
        reference_placement=config.reference.placement,
        reference_buffer_bytes=config.reference.buffer_bytes,
        reference_rename=config.reference.rename,
        not_projected=[f"^{re.escape(name)}$" for name in sorted(new)],
        max_grad_norm=run.engine.max_grad_norm,
        previous=config.reference.previous,
        kernels=config.training.kernels,
        projection=config.training.projection,
        statistics=config.training.statistics,
    )


def _evaluate(run: _Run, config: Config, here: Place) -> SuiteResult:
    assert run.task is not None, "the schema asks for data.classes where there is a suite"
    loaders = {
        entry.name: _Prepared(
            run.engine,
            build_loader(
                ShardSet.open(entry.shards),
                run.task,
                batch_samples=config.evaluation.batch_samples,
                rank=here.rank,
                world_size=here.world_size,
                workers=config.data.workers,
                seed=config.run.seed,
                shuffle_buffer_samples=0,
                train=False,
            ),
        )
        for entry in config.evaluation.suite
    }
    shifts = {entry.name: entry.shift for entry in config.evaluation.suite}
    with run.engine.inference():
        return evaluate_suite(run.engine.model, run.task, loaders, shifts, device=here.device, reduce_=here.sum_)


@dataclass
class _Prepared(Iterable[Batch]):
    """A loader whose batches have the dtype that the engine computes in."""

    engine: Engine
    loader: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (prepared(self.engine, batch) for batch in self.loader)


def _report(config: Config, folder: Path, result: SuiteResult) -> None:
    """The run's own table: ``results.*`` in its folder, and on the screen."""
    rows = [ReportRow(config.method.name, result)]
    notes = [
        f"learning rate {config.optimizer.learning_rate:g}, {config.optimizer.name}, seed {config.run.seed}",
        f"training shards: {', '.join(config.data.train)}",
    ]
    write_report(rows, folder, notes=notes, strength={config.method.name: read_strength(folder)})
    print_report(rows, notes)


def save_final(run: _Run, folder: Path, here: Place) -> None:
    """Write the model to ``folder`` in Hugging Face layout: safetensors, config, processor, tokenizer. Collective."""
    state = run.engine.full_state_dict()

    def write() -> None:
        with atomic_folder(folder, overwrite=True) as partial:
            _save_model(run, partial, state)
            for part in (run.built.processor, run.built.tokenizer):
                if part is not None:
                    part.save_pretrained(partial)

    here.on_rank_0(write)  # nobody goes on, or leaves, before the files are there


def _save_model(run: _Run, folder: Path, state: dict[str, torch.Tensor]) -> None:
    model: Any = run.built.model
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=state)
        return
    # FSDP2 and DeepSpeed change the live model's class and parameters: save through one without weights of its own.
    with torch.device("meta"):
        twin: Any = run.model_class(model.config)
    twin.save_pretrained(folder, state_dict=state)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _prepare(folder: Path, config: Config) -> None:
    """Rank 0's part before anything is built: find every problem, then make the run's folder.

    Raises:
        ConfigError: all problems, at once.
    """
    problems = find_problems(config)
    try:
        # The table of an earlier `evaluate` may be there already.
        earlier = folder.is_dir() and any(entry.name != "evaluation" for entry in folder.iterdir())
        if folder.exists() and not folder.is_dir():
            problems.append(f"run.folder: {folder} is a file; expected a folder or nothing there")
        elif earlier and not config.run.overwrite:
            problems.append(f"run.folder: {folder} holds an earlier run; set run.overwrite: true, or another folder")
        elif earlier and (read_status(folder) or {}).get("total_steps") is None:
            problems.append(f"run.folder: {folder} is not empty and holds no run of ours; choose another folder")
        elif earlier:
            problems += _inputs_inside(folder, config)
        _refuse(problems)
        if earlier:
            shutil.rmtree(folder.resolve())
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.folder: {folder} cannot be made ready ({error})") from error
    write_file(folder / "config.yaml", dump_config(config))


def _inputs_inside(folder: Path, config: Config) -> list[str]:
    """What the run reads from the folder that it is about to replace."""
    sets = [config.data.train, *(entry.shards for entry in config.evaluation.suite)]
    inputs = [
        config.model.path,
        config.reference.source,
        config.data.classes or "",
        *(name for one in sets for name in one),
    ]
    inside = [name for name in inputs if Path(name).resolve().is_relative_to(folder.resolve())]
    return [f"run.overwrite: {folder} would be replaced, but the run reads {name} from it" for name in inside]
