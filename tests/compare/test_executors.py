"""Real processes: trials of this machine, jobs through submitit's local executor, and what becomes of them at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from digrap_scale.cli import main
from digrap_scale.compare import executors
from digrap_scale.compare.executors import _starter, trial_command
from digrap_scale.compare.grid import TrialMaker
from digrap_scale.compare.load import load_grid
from digrap_scale.compare.schema import ExecutorConfig
from digrap_scale.errors import ConfigError
from tests.compare.grids import grid_of, write_data, write_grid


@pytest.mark.parametrize("name", ["local", "submitit"])
def test_a_command_runs_and_tells_its_exit_code(name: str, tmp_path: Path) -> None:
    settings = ExecutorConfig(name=name, cluster="local", timeout_minutes=1)  # type: ignore[arg-type]
    with _starter(settings, tmp_path) as start:
        code = "import os, sys; print('said', os.environ['WORD']); sys.exit(3)"
        assert start([sys.executable, "-c", code], tmp_path / "log.txt", {"WORD": "this"}) == 3
    assert (tmp_path / "log.txt").read_text() == "said this\n"


def test_submitit_tells_what_it_does_not_know(tmp_path: Path) -> None:
    settings = ExecutorConfig(name="submitit", cluster="local", parameters={"partition_of_slurm": "x"})
    with pytest.raises(ConfigError, match="submitit refuses cluster `local` and its parameters: .*partition_of_slurm"):
        with _starter(settings, tmp_path):
            pass


def test_a_job_that_is_not_taken_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the queue, say: the trial's log says so, and the caller goes on."""
    import submitit

    def refuse(*_: object) -> None:
        raise submitit.core.utils.FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit")

    settings = ExecutorConfig(name="submitit", cluster="local", timeout_minutes=1)
    with _starter(settings, tmp_path) as start:
        monkeypatch.setattr(submitit.AutoExecutor, "submit", refuse)
        assert start(["true"], tmp_path / "log.txt", {}) == -1
    assert (tmp_path / "log.txt").read_text() == "not submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit\n"


def test_nothing_is_submitted_once_the_others_were_cancelled(tmp_path: Path) -> None:
    """A trial that waits for its turn while compare is told to stop would run on, and compare wait for it."""
    settings = ExecutorConfig(name="submitit", cluster="local", timeout_minutes=1)
    with pytest.raises(KeyboardInterrupt), _starter(settings, tmp_path) as start:
        raise KeyboardInterrupt
    assert start(["touch", str(tmp_path / "ran")], tmp_path / "log.txt", {}) == -1
    assert not list(tmp_path.glob("submitit/*_submitted.pkl")) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_several_ranks_start_through_torchrun(tmp_path: Path, backend: str) -> None:
    """ZeRO, too: DeepSpeed's launcher would take the first devices, whatever a trial was given."""
    grid = grid_of(tmp_path)
    grid["base"]["sharding"] = {"backend": backend}
    maker = TrialMaker(load_grid(write_grid(tmp_path, grid)), "grid.yaml")
    setting = (("optimizer.learning_rate", 1e-3),)
    command = trial_command(maker.train("all", "FT", setting, 0), 2, Path("x.yaml"))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert command[5:] == ["2", "-m", "digrap_scale", "train", "x.yaml"]
    assert trial_command(maker.zero_shot("all"), 2, Path("x.yaml"))[-2:] == ["evaluate", "x.yaml"]
    assert trial_command(maker.zero_shot("all"), 1, Path("x.yaml"))[1:] == ["-m", "digrap_scale", "evaluate", "x.yaml"]


def test_trials_beside_each_other_have_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-8f1c,7,9")
    settings = ExecutorConfig(trials=2, ranks=2)
    given = [executors._environment(settings, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert given == ["2,3", "GPU-8f1c,7"]
    with pytest.raises(ConfigError, match="expected 3 trials × 2 ranks to fit 5 accelerators"):
        executors._environment(ExecutorConfig(trials=3, ranks=2), 0)


def test_real_trials_from_the_search_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time; a method whose head is nowhere fails alone, and is tried again by the second call."""
    write_data(tmp_path)
    methods: dict[str, Any] = {
        "FT": {"method": {"name": "none"}},
        "broken": {"method": {"name": "linear_probe", "head": ["^nowhere"]}},
    }
    grid = grid_of(
        tmp_path,
        methods=methods,
        shared_search={},
        seeds=[0],
        zero_shot=False,
        wise_ft={"of": "FT", "alphas": [0.0, 1.0]},
        executor={"name": "local", "trials": 2},
    )
    path = write_grid(tmp_path, grid)
    assert main(["compare", path]) == 1
    error = capsys.readouterr().err
    assert "1 trials failed" in error and "all: broken, seed 0: exit 2" in error and "^nowhere" in error
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = {row["method"]: row["cells"] for row in stored["tables"][0]["rows"]}
    assert set(cells) == {"FT", "WiSE-FT"} and 0 <= cells["FT"]["test"]["mean"] <= 1
    run = next((tmp_path / "out" / "trials").glob("all-ft-seed0-*/run"))
    assert (run / "layers.jsonl").is_file() and len(json.loads((run / "results.json").read_text())["rows"]) == 3
    note = json.loads((run.parent / "trial.json").read_text())
    assert note["exit_code"] == 0 and note["command"][1:4] == ["-m", "digrap_scale", "train"]
    assert {"id_ood.png", "conflicts.png", "drift.png"} <= {path.name for path in (tmp_path / "out").glob("*.png")}
    before = (run / "results.json").stat().st_mtime_ns
    del methods["broken"]
    assert main(["compare", write_grid(tmp_path, {**grid, "methods": methods})]) == 0
    assert (run / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_trials_go_through_submitit_and_several_ranks(tmp_path: Path) -> None:
    write_data(tmp_path)
    grid = grid_of(
        tmp_path,
        shared_search={},
        seeds=[0, 1],
        executor={"name": "submitit", "cluster": "local", "trials": 1, "ranks": 2, "timeout_minutes": 5},
    )
    grid["base"]["sharding"] = {"backend": "fsdp2"}
    assert main(["compare", write_grid(tmp_path, grid)]) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["seeds"] for row in stored["tables"][0]["rows"]] == [1, 2, 2]
    assert list((tmp_path / "out" / "submitit").glob("*_log.out"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "a closed terminal", "submitit"])
def test_a_stopped_comparison_goes_on_from_its_trials_checkpoints(how: str, tmp_path: Path) -> None:
    """Stopped in the middle of a trial: it saves, nothing is left running, and the same command ends as if nothing had been.

    A terminal signals all processes that a command has started in its group.
    """
    write_data(tmp_path)
    grid = grid_of(tmp_path, methods={"FT": {"method": {"name": "none"}}}, shared_search={}, seeds=[0], zero_shot=False)
    grid["base"]["training"]["steps"] = 400
    grid["base"]["checkpoint"] = {"final": False, "every_steps": 10_000}
    if how == "submitit":
        grid["executor"] = {"name": "submitit", "cluster": "local", "timeout_minutes": 10}
    command = [sys.executable, "-m", "digrap_scale", "compare", write_grid(tmp_path, grid)]
    process = subprocess.Popen(command, start_new_session=True)
    trials = tmp_path / "out" / "trials"
    while not (found := list(trials.glob("*/run/metrics.jsonl"))) or found[0].read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.05)
    number = {"Ctrl-C": signal.SIGINT, "a closed terminal": signal.SIGHUP}.get(how, signal.SIGTERM)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    assert process.wait(120) == 75
    run = found[0].parent
    until = time.monotonic() + (60 if how == "submitit" else 0)  # which waits for its own processes only, a second each
    while (state := json.loads((run / "status.json").read_text())["state"]) == "running" and time.monotonic() < until:
        time.sleep(0.1)
    assert state == "preempted"
    (saved,) = (run / "checkpoints").glob("step-*")
    assert subprocess.run(command, check=False, env=dict(os.environ)).returncode == 0
    assert f"resumed from {saved.name}" in (run / "messages.log").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 401))
