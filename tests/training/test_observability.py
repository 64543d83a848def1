"""What a run tells beside its metrics: where time goes, histograms over layers, a profiler's trace, other services."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digrap_scale.cli import main
from digrap_scale.training.log import read_metrics, read_status
from digrap_scale.training.trackers import TRACKING_FILE, Trackers
from tests.data.vqa_samples import vqa_shard
from tests.models.tiny_vlm import save_tiny_vlm

STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def values(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"path": str(model), "task": "vqa"},
        "data": {"train": [str(vqa_shard(tmp_path / "shards" / "train-000000.tar", [1, 2, 0, 1, 1, 1]))]},
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": STEPS, "global_batch_samples": 3},
        "checkpoint": {"every_steps": 2, "final": False},
        "evaluation": {"at_end": False},
        "logging": {"every_steps": 1},
    }


def write(tmp_path: Path, values: dict[str, Any]) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def test_a_run(values: dict[str, Any], tmp_path: Path) -> None:
    values["logging"].update(
        layers_every_steps=2, strength_every_steps=2, profiler={"skip_steps": 1, "steps": 2, "memory": True}
    )
    start = time.monotonic()
    assert main(["train", write(tmp_path, values)]) == 0
    elapsed, run = time.monotonic() - start, tmp_path / "run"
    rows = read_metrics(run)
    for row in rows:
        assert set(row["seconds"]) == {"data", "forward", "backward", "optimizer"}
        assert min(row["seconds"].values()) > 0
    assert sum(sum(row["seconds"].values()) for row in rows) < elapsed
    peaks = [row["peak_memory_bytes"] for row in rows]
    assert peaks == sorted(peaks) and 50e6 < peaks[-1] < 64e9

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert {f"train/seconds/{part}" for part in rows[0]["seconds"]} <= set(board.Tags()["scalars"])
    assert set(board.Tags()["histograms"]) == {"layers/strength", "layers/conflict_rate", "layers/drift"}
    layers = len(json.loads((run / "strength/strength.jsonl").read_text().splitlines()[0])["names"])
    for name in ("strength", "conflict_rate", "drift"):
        events = board.Histograms(f"layers/{name}")
        assert [event.step for event in events] == ([1, 2, 4] if name == "strength" else [2, 4])
        assert all(event.histogram_value.num == layers for event in events)
    assert board.Histograms("layers/conflict_rate")[0].histogram_value.max <= 1
    assert board.Histograms("layers/drift")[1].histogram_value.max > 0
    mean = board.Histograms("layers/strength")[-1].histogram_value
    assert mean.sum / mean.num == pytest.approx(rows[-1]["strength_mean"], abs=1e-6)

    trace = json.loads((run / "profile" / "rank-0.json").read_text())["traceEvents"]
    spans = [event for event in trace if event.get("name") == "step/backward" and event.get("ph") == "X"]
    assert len(spans) == 2, "the window has two steps"
    assert any(event.get("name") == "ProfilerStep#2" for event in trace)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed(
    values: dict[str, Any],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("digrap_scale.training.trackers.importlib.util.find_spec", lambda _: None)
    values["logging"][name] = {"project": "p"} if name == "wandb" else {"tracking_uri": "http://127.0.0.1:9"}
    assert main(["validate", write(tmp_path, values)]) == 2
    assert f"logging.{name}: needs the package {name}, which is not installed: pip install" in capsys.readouterr().err


def test_a_service_that_fails_is_given_up_and_told() -> None:
    class Failing:
        name, run_id = "mlflow", "1"

        def log(self, step: int, values: Any) -> None:
            raise ConnectionError("server is gone\nand more")

        def close(self, state: str) -> None:
            raise AssertionError("given up before")

    told: list[str] = []
    trackers = Trackers()
    trackers.open = [Failing()]
    for step in (1, 2):
        trackers.log(step, {"train/loss": 1.0}, told.append)
    trackers.close("done", told.append)
    assert told == ["logging.mlflow: server is gone; nothing more is sent there, metrics.jsonl has everything"]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB; checksum (4), length (2), type (1), part of a record."""
    at, record = 7, b""  # W&B's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_offline(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as pb

    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    values["logging"]["wandb"] = {"project": "tests", "mode": "offline"}
    assert main(["train", write(tmp_path, values)]) == 0
    run_id = json.loads((tmp_path / "run" / TRACKING_FILE).read_text())["wandb"]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    losses, config, exit_codes = {}, {}, []
    for data in log_records(file.read_bytes()):
        record = pb.Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in items:
            losses[json.loads(items["step"])] = json.loads(items["train/loss"])
        config.update({item.key: item.value_json for item in record.run.config.update})
        if record.HasField("exit"):
            exit_codes.append(record.exit.exit_code)
    assert losses == {row["step"]: pytest.approx(row["loss"]) for row in read_metrics(tmp_path / "run")}
    assert json.loads(config["optimizer.learning_rate"]) == 3e-3 and exit_codes == [0]


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("mlflow")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/runs.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            *store,
        ],
        cwd=tmp_path,
        stdout=(tmp_path / "server.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        else:
            raise AssertionError((tmp_path / "server.log").read_text())
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_mlflow_server(values: dict[str, Any], tmp_path: Path, mlflow_server: str) -> None:
    """A real server: the config and every metric; a resumed run goes on in the run that it was."""
    from mlflow import MlflowClient

    values["logging"]["mlflow"] = {"tracking_uri": mlflow_server, "experiment": "robust"}
    file = write(tmp_path, values)
    assert main(["train", file]) == 0
    run_id = json.loads((tmp_path / "run" / TRACKING_FILE).read_text())["mlflow"]
    client = MlflowClient(mlflow_server)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert client.get_experiment(found.info.experiment_id).name == "robust"
    assert found.data.params["optimizer.learning_rate"] == "0.003"
    rows = read_metrics(tmp_path / "run")
    history = client.get_metric_history(run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == {row["step"]: row["loss"] for row in rows}
    assert client.get_metric_history(run_id, "train/seconds/backward")

    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "done"
    (tmp_path / "run" / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    for newest in (tmp_path / "run" / "checkpoints").glob(f"step-{STEPS}"):
        (newest / "COMMITTED").unlink()
    assert main(["train", file]) == 0
    assert json.loads((tmp_path / "run" / TRACKING_FILE).read_text())["mlflow"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "train/loss")].count(STEPS) == 2


def test_a_server_that_is_not_there(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    values["logging"]["mlflow"] = {"tracking_uri": "http://127.0.0.1:9"}
    assert main(["train", write(tmp_path, values)]) == 2
    assert "logging.mlflow: no run could be opened there" in capsys.readouterr().err
