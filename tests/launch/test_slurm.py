"""`slurm.sbatch` on a real SLURM: two nodes against one, a job that is preempted and comes back, `compare` by submitit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from digrap_scale.training.log import read_status
from tests.compare.grids import grid_of, write_data, write_grid
from tests.distributed.ranks import free_port
from tests.distributed.test_launched import config
from tests.launch.slurm_cluster import PROGRAMS, slurm_cluster, state_of
from tests.models.tiny import save_vit

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
TIMEOUT_S = 500

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in PROGRAMS.values() or os.geteuid() != 0,
        reason="needs root, and SLURM with munge (Debian: slurm-wlm)",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "PORT": str(free_port()),
            "HEAD": "127.0.0.1",  # the nodes' names are not known to the resolver
        }


def submit(slurm: dict[str, str], folder: Path, file: Path, *options: str) -> str:
    """The job's number."""
    command = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--chdir", str(folder), *options]
    done = subprocess.run([*command, str(SCRIPT), str(file)], env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(slurm: dict[str, str], job: str, state: str, folder: Path) -> None:
    until = time.monotonic() + TIMEOUT_S
    while (now := state_of(job, slurm)) != state:
        logs = "".join(path.read_text() for path in folder.glob("*.log"))
        assert now in ("PENDING", "RUNNING", "COMPLETING") and time.monotonic() < until, f"{now}, not {state}: {logs}"
        time.sleep(0.3)


def write(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(values))
    return file


def test_two_nodes_equal_one(slurm: dict[str, str], tmp_path: Path) -> None:
    model, saved = save_vit(tmp_path / "vit", classes=16), []
    for nodes, tasks in ((1, 2), (2, 1)):
        run = tmp_path / f"run-{nodes}"
        file = write(tmp_path / f"{nodes}.yaml", config(model, run, sharding={"backend": "fsdp2"}))
        job = submit(slurm, tmp_path, file, f"--nodes={nodes}", f"--ntasks-per-node={tasks}")
        wait_for(slurm, job, "COMPLETED", tmp_path)
        saved.append(load_file(run / "final" / "model.safetensors"))
    assert set(saved[0]) == set(saved[1]) and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_preempted_job_comes_back_and_ends_equal(slurm: dict[str, str], tmp_path: Path) -> None:
    """A job of higher priority takes its nodes: it saves, goes back into the queue, and ends as one that was left alone."""
    model = save_vit(tmp_path / "vit", classes=16)
    more = {"sharding": {"backend": "fsdp2"}, "training": {"steps": 150}, "checkpoint": {"every_steps": 10_000}}
    alone = write(tmp_path / "alone.yaml", config(model, tmp_path / "alone", **more))
    taken = write(tmp_path / "taken.yaml", config(model, tmp_path / "taken", **more))
    wait_for(slurm, submit(slurm, tmp_path, alone, "--nodes=2", "--ntasks-per-node=1"), "COMPLETED", tmp_path)
    job = submit(slurm, tmp_path, taken, "--nodes=2", "--ntasks-per-node=1", "--partition=low")
    until, metrics = time.monotonic() + TIMEOUT_S, tmp_path / "taken" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < until, "no steps"
        time.sleep(0.1)
    command = ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=high", "--chdir", str(tmp_path)]
    done = subprocess.run([*command, "--wrap", "sleep 3"], env=slurm, capture_output=True, text=True, check=True)
    wait_for(slurm, done.stdout.strip(), "COMPLETED", tmp_path)
    wait_for(slurm, job, "COMPLETED", tmp_path)
    log = (tmp_path / f"digrap-scale-{job}.log").read_text()
    assert "preempted and saved; back into the queue" in log
    assert "resumed from step-" in (tmp_path / "taken" / "messages.log").read_text(encoding="utf-8")
    assert (read_status(tmp_path / "taken") or {})["state"] == "done"
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("alone", "taken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_job_saves_before_its_time_is_over(slurm: dict[str, str], tmp_path: Path) -> None:
    """SLURM counts time limits in minutes: of two, the signal comes one before the end, and the job goes back into the queue."""
    more = {"sharding": {"backend": "ddp"}, "training": {"steps": 1_000_000}, "checkpoint": {"every_steps": 10_000_000}}
    file = write(tmp_path / "long.yaml", config(save_vit(tmp_path / "vit", classes=16), tmp_path / "long", **more))
    job = submit(slurm, tmp_path, file, "--nodes=1", "--ntasks-per-node=1", "--time=2", "--signal=TERM@60")
    log, until = tmp_path / f"digrap-scale-{job}.log", time.monotonic() + TIMEOUT_S
    while "back into the queue" not in (log.read_text() if log.is_file() else ""):
        assert time.monotonic() < until, "the signal did not come"
        time.sleep(0.5)
    subprocess.run(["scancel", job], env=slurm, check=True)
    assert "DUE TO TIME LIMIT" not in log.read_text()
    assert (read_status(tmp_path / "long") or {})["state"] == "preempted"
    assert len(list((tmp_path / "long" / "checkpoints").glob("step-*/COMMITTED"))) == 1


def test_compare_runs_its_trials_as_jobs(slurm: dict[str, str], tmp_path: Path) -> None:
    write_data(tmp_path)
    grid = grid_of(
        tmp_path,
        shared_search={},
        methods={"FT": {"method": {"name": "none"}}},
        seeds=[0, 1, 2],
        executor={"name": "submitit", "cluster": "slurm", "trials": 2, "timeout_minutes": 5,
                  "parameters": {"slurm_partition": "low", "cpus_per_task": 1}},
    )  # fmt: skip
    command = [sys.executable, "-m", "digrap_scale", "compare", write_grid(tmp_path, grid)]
    done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["method"], row["seeds"]) for row in stored["tables"][0]["rows"]] == [("zero-shot", 1), ("FT", 3)]
    assert list((tmp_path / "out" / "submitit").glob("*_log.out"))
