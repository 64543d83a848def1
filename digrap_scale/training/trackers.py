"""Who else gets a run's metrics: Weights & Biases and MLflow, by config. ``metrics.jsonl`` has them all in any case."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.config import Config
from digrap_scale.config.schema import MlflowConfig, WandbConfig
from digrap_scale.errors import ConfigError, Preempted, brief
from digrap_scale.training.setup import Place

TRACKING_FILE = "tracking.json"
_PARAMETER_LENGTH, _PARAMETERS_A_BATCH = 6000, 100  # MLflow's own limits
# A server that is gone must not hold up the other ranks: MLflow's defaults wait for minutes.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_NAMES = ("wandb", "mlflow")


class Tracker(Protocol):
    """One run at one service.

    Attributes:
        name: the config's word for the service.
        run_id: the service's, by which a resumed run goes on there.
    """

    name: str
    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, by name."""

    def close(self, state: str) -> None:
        """The run's end: ``done``, ``failed`` or ``preempted``."""


class WandbTracker:
    """A Weights & Biases run; steps are a metric of their own, so that a resumed run may go back."""

    name = "wandb"

    def __init__(self, settings: WandbConfig, folder: Path, parameters: dict[str, Any], run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or folder.name,
            mode=settings.mode,
            id=run_id,
            resume="allow" if run_id is not None else None,
            dir=folder,
            config=parameters,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id = self._run.id
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "done" else 1)


class MlflowTracker:
    """An MLflow run, through a client of its own: nothing of MLflow's global state is touched."""

    name = "mlflow"

    def __init__(self, settings: MlflowConfig, folder: Path, parameters: dict[str, Any], run_id: str | None) -> None:
        for variable, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(settings.tracking_uri)
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        self.run_id = self._client.create_run(experiment_id, run_name=settings.name or folder.name).info.run_id
        params = [Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in parameters.items()]
        for start in range(0, len(params), _PARAMETERS_A_BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + _PARAMETERS_A_BATCH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, state: str) -> None:
        ends = {"done": "FINISHED", "preempted": "KILLED"}
        self._client.set_terminated(self.run_id, status=ends.get(state, "FAILED"))


class Trackers:
    """The trackers of a run, on rank 0. They are sent to by a thread: a slow service does not slow the steps. One that
    fails is given up, and the user told: training goes on without it.
    """

    def __init__(self) -> None:
        self.open: list[Tracker] = []
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trackers")

    def log(self, step: int, values: Mapping[str, float], tell: Callable[[str], None]) -> None:
        """Metrics of a step, to all; ``tell`` hears of those that have failed since."""
        self._to_all(lambda tracker: tracker.log(step, values))
        self._report(tell)

    def close(self, state: str, tell: Callable[[str], None]) -> None:
        """The run's end, to all, after everything that is still to be sent."""
        self._to_all(lambda tracker: tracker.close(state))
        self._sender.shutdown(wait=True)
        self._report(tell)

    def _to_all(self, action: Callable[[Tracker], None]) -> None:
        def send() -> None:
            for tracker in list(self.open):
                try:
                    action(tracker)
                except Exception as error:  # a service's client raises what it likes
                    self.open.remove(tracker)
                    self._failures.put(f"logging.{tracker.name}: {brief(error)}")

        if self.open:
            self._sender.submit(send)

    def _report(self, tell: Callable[[str], None]) -> None:
        while not self._failures.empty():
            tell(f"{self._failures.get()}; nothing more is sent there, metrics.jsonl has everything")


@contextmanager
def tracking(
    config: Config, folder: Path, here: Place, resumed: bool, tell: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of ``logging``, open while the block runs; a resumed run goes on in its old ones. Collective.

    Raises:
        ConfigError: a service cannot be reached, or refuses, on every rank.
    """
    trackers = Trackers()
    here.on_rank_0(lambda: _open(trackers, config, folder, resumed))
    try:
        yield trackers
    except BaseException as error:
        trackers.close("preempted" if isinstance(error, Preempted) else "failed", tell)
        raise
    trackers.close("done", tell)


def missing_trackers(config: Config) -> list[str]:
    """A line for each service that is asked for, and whose package is not installed."""
    return [
        f"logging.{name}: needs the package {name}, which is not installed: pip install 'digrap-scale[{name}]', or leave "
        f"logging.{name} out"
        for name in _NAMES
        if getattr(config.logging, name) is not None and importlib.util.find_spec(name) is None
    ]


def _open(trackers: Trackers, config: Config, folder: Path, resumed: bool) -> None:
    file = folder / TRACKING_FILE
    ids: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    parameters = _flat(config.model_dump(mode="json"))
    for name, opened in (("wandb", WandbTracker), ("mlflow", MlflowTracker)):
        settings = getattr(config.logging, name)
        if settings is None:
            continue
        try:
            trackers.open.append(opened(settings, folder, parameters, ids.get(name)))
        except Exception as error:  # a service's client raises what it likes
            trackers.close("failed", lambda _: None)
            raise ConfigError(
                f"logging.{name}: no run could be opened there ({brief(error)}); check its keys and that it can be reached, or "
                f"leave logging.{name} out"
            ) from error
    if trackers.open:
        write_file(file, json.dumps({tracker.name: tracker.run_id for tracker in trackers.open}) + "\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``section.key`` → value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
