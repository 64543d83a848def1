"""The suite's table of a run's model, or of any weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from digrap_scale.config import Config
from digrap_scale.data.loader import build_loader
from digrap_scale.data.shards import ShardSet
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.report import ReportRow, print_report, write_report
from digrap_scale.evaluation.suite import SuiteResult, evaluate_suite
from digrap_scale.sharding.engine import Engine
from digrap_scale.training.build_run import BuiltRun, build_run
from digrap_scale.training.loop import prepared
from digrap_scale.training.prepare import refuse
from digrap_scale.training.setup import Place, place
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
    with place(config) as here:
        here.on_rank_0(lambda: refuse(find_problems(config)))
        result = evaluate_run(build_run(config, here, adapter), config, here)
        if here.rank == 0:
            rows = [ReportRow(weights or config.model.path, result)]
            write_report(rows, Path(config.run.folder) / "evaluation", notes=[])
            if show:
                print_report(rows)
        return result


def evaluate_run(run: BuiltRun, config: Config, here: Place) -> SuiteResult:
    """Every test set of the suite with the run's weights as they are; the result on every rank. Collective."""
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
        return evaluate_suite(
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


@dataclass
class _Prepared(Iterable[Batch]):
    """A loader whose batches have the dtype that the engine computes in."""

    engine: Engine
    loader: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return (prepared(self.engine, batch) for batch in self.loader)
