"""A run from its config to its folder: build, attach, train, save, evaluate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.resume import open_together
from digrap_scale.config import Config
from digrap_scale.data.tasks.build import build_task
from digrap_scale.errors import DigrapError, PeerError
from digrap_scale.evaluation.report import ReportRow, print_report, write_report
from digrap_scale.evaluation.strength import read_strength
from digrap_scale.models.groups import build_groups, describe_groups
from digrap_scale.training.batches import (
    count_steps,
    open_training_data,
    skipped_lines,
    training_loader,
    training_patterns,
)
from digrap_scale.training.build_run import attach_projector, build_run
from digrap_scale.training.clock import profiling
from digrap_scale.training.environment import note_environment
from digrap_scale.training.evaluate import evaluate_run, open_evaluation
from digrap_scale.training.faults import Nobody, StopRequest, Watch
from digrap_scale.training.final import save_final
from digrap_scale.training.folder_lock import FolderLock
from digrap_scale.training.keep import keeping
from digrap_scale.training.log import RunLog
from digrap_scale.training.loop import train_steps
from digrap_scale.training.prepare import find_start, make_folder, refuse_shorter, telling_early_end
from digrap_scale.training.setup import (
    PREPARATION_S,
    Place,
    choose_operators,
    collective_timeout_s,
    launched_rank,
    limit_collectives,
    peer_errors,
    place,
    shared_store,
)
from digrap_scale.training.trackers import tracking
from digrap_scale.training.wise_ft import check_interpolation, interpolated_rows


def train(config: Config) -> None:
    """Run ``config`` from start to end, on every rank of the job.

    Raises:
        ConfigError, CheckpointError, SaveError, PeerError, NonFiniteError: see each; the message is for the user.
    """
    stop, watches, lock = StopRequest(), ExitStack(), FolderLock(Path(config.run.folder))
    choose_operators(config)
    with stop.listening(), lock, watches, ExitStack() as job:
        with telling_early_end(config, launched_rank(), lock):
            here = job.enter_context(place(config))
        _train(config, here, stop, watches, lock)


def _train(config: Config, here: Place, stop: StopRequest, watches: ExitStack, lock: FolderLock) -> None:
    folder = Path(config.run.folder)
    with telling_early_end(config, here.rank, lock):
        ranks = Ranks.of_job(collective_timeout_s(config))
        preparing = Ranks.of_job(PREPARATION_S)
        start = preparing.on_first(lambda: find_start(folder, config, lock))
        if start.done:
            if here.rank == 0:
                print(
                    f"{folder}: the run is done; a command that its launcher repeats finds nothing to do",
                    file=sys.stderr,
                )
            return
        checkpoint = None if start.checkpoint is None else open_together(start.checkpoint, preparing)
        preparing.on_first(lambda: make_folder(folder, config, start, lock))
        preparing.on_first(lambda: note_environment(folder, config, here.world_size))
        data = open_training_data(config, preparing.on_first)
        evaluates = config.evaluation.at_end and bool(config.evaluation.suite)
        measured = open_evaluation(config, data) if evaluates else None
        preparing.together(lambda: None)  # nodes that have fetched their shards wait for those that have not
        here.same("training shards: samples of each", [source.shards.counts for source in data.sources])
        total_steps = count_steps(config, sum(source.shards.samples for source in data.sources))
        start_step = 0 if checkpoint is None else checkpoint.step
        preparing.on_first(lambda: refuse_shorter(config, start_step, total_steps))
    with (
        RunLog(
            folder,
            rank=here.rank,
            total_steps=total_steps,
            tensorboard=config.logging.tensorboard,
            every_steps=config.logging.every_steps,
            strength_every_steps=config.logging.strength_every_steps,
            layers_every_steps=config.logging.layers_every_steps,
            start_step=start_step,
        ) as log,
        watching(config, here, log, watches, stop) as watch,
        peer_errors(watch.diagnosis),
        tracking(config, folder, here, start_step > 0, log.message) as log.trackers,
    ):
        for line in start.notes:
            log.message(line)
        run = build_run(config, here)
        limit_collectives(collective_timeout_s(config))
        check_interpolation(run, config)
        groups = build_groups(run.engine.module, config.optimizer, run.built.head)
        for line in skipped_lines(data.sources) + run.built.report + describe_groups(groups):
            log.message(line)
        projector = attach_projector(run, config)
        log.message(projector.summary())
        train_task = build_task(config, run.built.processor, run.built.tokenizer, True, run.built.family)
        batches = training_loader(data.sources, train_task, config, here, run.engine)
        with keeping(run, projector, batches, config, here, log, watch, stop, ranks, total_steps) as keeper:
            if checkpoint is not None:
                keeper.load(checkpoint, log.message)
                log.message(f"resumed from {checkpoint.folder.name}")
            with profiling(config.logging.profiler, folder, here.rank) as step_done:
                train_steps(
                    run.engine,
                    projector,
                    train_task,
                    batches,
                    log,
                    config,
                    here,
                    total_steps,
                    keeper,
                    start_step,
                    step_done,
                )
        projector.detach()
        if config.checkpoint.final:
            save_final(run, folder / "final", here)
            log.message(f"weights: {folder / 'final'}")
        if measured is not None:
            rows = [ReportRow(config.method.name, evaluate_run(run, config, here, measured))]
            rows += interpolated_rows(run, projector.backend, config, here, measured)
            here.on_rank_0(lambda: _report(config, folder, rows))


@contextmanager
def watching(config: Config, here: Place, log: RunLog, at_the_end: ExitStack, stop: StopRequest) -> Iterator[Nobody]:
    """The heartbeats of the job's ranks, while the block runs; ``at_the_end`` is left when the process group is. Collective."""
    if here.world_size == 1:
        yield Nobody()
        return
    timeout_s = config.sharding.reduce_timeout_s
    on_cpu = here.device.type == "cpu"
    watch = Watch(shared_store(here), here.rank, here.world_size, timeout_s, log.given_up, collectives_raise=on_cpu)
    at_the_end.callback(watch.stay)
    try:
        yield watch
    except BaseException as error:
        stop.hold()
        if isinstance(error, DigrapError):
            watch.agree(error)
        # A launcher that ends this process may do so since another one failed: that says more.
        other = watch.failed() if isinstance(error, SystemExit) and error.code else None
        watch.close(error)
        if other is not None:
            raise PeerError(other) from error
        raise
    watch.close()


def _report(config: Config, folder: Path, rows: list[ReportRow]) -> None:
    """The run's own table: ``results.*`` in its folder, and on the screen."""
    notes = [
        f"learning rate {config.optimizer.learning_rate:g}, {config.optimizer.name}, seed {config.run.seed}",
        f"training shards: {', '.join(training_patterns(config))}",
    ]
    write_report(rows, folder, notes=notes, strength={config.method.name: read_strength(folder)})
    print_report(rows, notes)
