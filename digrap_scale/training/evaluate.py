"""The suite's table of a run's model, or of any weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.config import Config
from digrap_scale.config.data_checks import VALIDATION
from digrap_scale.data.fetch import open_shards
from digrap_scale.data.hold_out import join
from digrap_scale.data.loader import build_evaluation_loader
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.sources import Source
from digrap_scale.data.tasks.vqa import VqaTask
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.report import ReportRow, print_report, write_report
from digrap_scale.evaluation.shift import ShiftDegrees, measure_shift
from digrap_scale.evaluation.suite import Shift, SuiteResult, evaluate_suite, evaluation_mode
from digrap_scale.models.embeddings import build_embed
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.batches import TrainingData, open_training_data
from digrap_scale.training.build_run import BuiltRun, build_run
from digrap_scale.training.loop import prepared
from digrap_scale.training.prepare import refuse
from digrap_scale.training.setup import PREPARATION_S, Place, peer_errors, place
from digrap_scale.training.validate import find_problems
from digrap_scale.types import Batch


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
    with place(config) as here, peer_errors():
        preparing = Ranks.of_job(PREPARATION_S)
        here.on_rank_0(lambda: refuse(find_problems(config)), preparing)
        reads_training = config.data.hold_out is not None or config.evaluation.shift_degree is not None
        data = open_evaluation(config, open_training_data(config, preparing.on_first) if reads_training else None)
        preparing.together(lambda: None)  # nodes that have fetched their shards wait for those that have not
        result = evaluate_run(build_run(config, here, adapter), config, here, data)
        rows = [ReportRow(weights or config.model.path, result)]
        here.on_rank_0(lambda: write_report(rows, Path(config.run.folder) / "evaluation", notes=[]))
        if show and here.rank == 0:
            print_report(rows)
        return result


@dataclass(frozen=True)
class EvaluationData:
    """What is measured, opened.

    Attributes:
        tests: the suite's sets, by name.
        validation: what ``data.hold_out`` withholds; None without it.
        training: what the sets' shifts are measured against; None without ``evaluation.shift_degree``.
    """

    tests: dict[str, ShardSet]
    validation: ShardSet | None
    training: ShardSet | None


def open_evaluation(config: Config, training: TrainingData | None) -> EvaluationData:
    """The suite's shards; before a run's first step, since to fetch them may take longer than ranks wait for each other.

    Args:
        training: the training shards; None where neither ``data.hold_out`` nor ``evaluation.shift_degree`` is set.

    Raises:
        ConfigError, SaveError: see ``open_shards``.
    """
    tests = {entry.name: open_shards(entry.shards, config.data) for entry in config.evaluation.suite}
    if training is None:
        return EvaluationData(tests, None, None)
    return EvaluationData(tests, training.validation, _shift_shards(config, training.sources))


def evaluate_run(run: BuiltRun, config: Config, here: Place, data: EvaluationData) -> SuiteResult:
    """Every test set of the suite, and what ``data.hold_out`` withholds (as ``validation``), with the run's weights as they
    are; the result on every rank. Collective."""
    assert run.task is not None, "the schema asks for data.classes where there is a suite"
    loaders = {name: _loader(run, config, here, shards) for name, shards in data.tests.items()}
    shifts: dict[str, Shift] = {entry.name: entry.shift for entry in config.evaluation.suite}
    if data.validation is not None:
        loaders[VALIDATION] = _loader(run, config, here, data.validation)
        shifts[VALIDATION] = "validation"
    with run.engine.inference():
        result = evaluate_suite(
            run.engine.model,
            run.task,
            loaders,
            shifts,
            device=here.device,
            reduce_=here.sum_,
            modalities={entry.name: entry.modality for entry in config.evaluation.suite},
            generate=run.engine.generate,
            gather=here.gather,
        )
        if config.evaluation.shift_degree is not None:
            assert data.training is not None
            tested = {name: loader for name, loader in loaders.items() if shifts[name] != "validation"}
            training = _loader(run, config, here, data.training)
            result = result.with_shift_degrees(_shift_degrees(run, config, here, training, tested))
    return result


def _shift_degrees(
    run: BuiltRun, config: Config, here: Place, training: Iterable[Batch], loaders: Mapping[str, Iterable[Batch]]
) -> ShiftDegrees:
    """How far each test set is from the training set, with the run's weights as they are. Collective."""
    model = run.engine.model
    is_text = run.task.encoder.is_text if isinstance(run.task, VqaTask) else None
    with evaluation_mode(model):
        embed = build_embed(config.model.task, run.engine.module, is_text)
        return measure_shift(model, embed, training, loaders, device=here.device, reduce_=here.sum_)


def _shift_shards(config: Config, sources: Sequence[Source]) -> ShardSet | None:
    """The training shards that shifts are measured against: all, or enough of them, drawn by the run's seed."""
    if config.evaluation.shift_degree is None:
        return None
    shards = join([source.shards for source in sources])
    wanted = config.evaluation.shift_degree.train_samples
    if wanted is None or wanted >= shards.samples:
        return shards
    order = list(range(len(shards.paths)))
    random.Random(f"digrap-shift/{config.run.seed}").shuffle(order)
    sums = itertools.accumulate(shards.counts[i] for i in order)
    enough = next(number for number, total in enumerate(sums, start=1) if total >= wanted)
    chosen = sorted(order[:enough])
    return replace(
        shards,
        paths=tuple(shards.paths[i] for i in chosen),
        counts=tuple(shards.counts[i] for i in chosen),
        offsets=tuple(shards.offsets[i] for i in chosen),
    )


def _loader(run: BuiltRun, config: Config, here: Place, shards: ShardSet) -> _Prepared:
    """Each sample once, in listed order, as evaluation takes them."""
    assert run.task is not None
    loader = build_evaluation_loader(
        shards,
        run.task,
        batch_samples=config.evaluation.batch_samples,
        rank=here.rank,
        world_size=here.world_size,
        workers=config.data.workers,
        seed=config.run.seed,
    )
    return _Prepared(run.engine, loader)


@dataclass
class _Prepared(Iterable[Batch]):
    """A loader whose batches have the dtype that the engine computes in."""

    engine: Engine
    loader: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (prepared(self.engine, batch) for batch in self.loader)
