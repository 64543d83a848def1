"""Real jobs under torchrun, struck by signals: how they end, what they say, and that they go on as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from digrap_scale.checkpoint.layout import step_folder
from digrap_scale.errors import CheckpointError
from digrap_scale.training.log import read_status
from tests.distributed.chaos import chaos
from tests.distributed.resume_runs import ASSETS, run_here, tensors_of, values_of
from tests.models.tiny import save_vit

TIMEOUT_S = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def launch(values: dict[str, Any], folder: Path, fault: dict[str, Any] | None = None, restarts: int = 0) -> str:
    """A job of two ranks; all that it printed. torchrun's own exit status is 1 for everything that is not 0."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.5", "-m", "tests.distributed.faulty", "train"]
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # for restarts; launch/torchrun.sh does, too
    if fault is not None:
        environment["FAULT"] = json.dumps(fault)
    done = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    return done.stdout + done.stderr


def short(model: Path, folder: Path, backend: str = "fsdp2", **sections: dict[str, Any]) -> dict[str, Any]:
    quick = {"checkpoint": {"every_steps": 2}, "sharding": {"reduce_timeout_s": TIMEOUT_S}}
    return values_of(model, folder / "run", backend, **{**quick, **sections})


def status(folder: Path) -> tuple[str, int, str]:
    found = read_status(folder / "run")
    assert found is not None
    return found["state"], found["exit_code"], found["reason"]


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    launch(short(model, folder), folder)
    return tensors_of(step_folder(folder / "run", 6))


def check_goes_on(folder: Path, values: dict[str, Any], expected: dict[str, torch.Tensor], line: str) -> None:
    printed = launch(values, folder)
    assert status(folder) == ("done", 0, ""), printed
    assert line in (folder / "run" / "messages.log").read_text()
    final = tensors_of(step_folder(folder / "run", 6))
    assert all(torch.equal(final[key], value) for key, value in expected.items()) and final.keys() == expected.keys()


def test_sigterm_of_one_rank_stops_all(model: Path, tmp_path: Path) -> None:
    printed = launch(
        short(model, tmp_path), tmp_path, {"rank": 1, "step": 3, "at": "forward and backward", "do": "SIGTERM"}
    )
    assert status(tmp_path) == ("preempted", 75, "preempted; saved step 3"), printed
    assert "preempted; saved step 3 (exit 75)" in printed
    assert step_folder(tmp_path / "run", 3).joinpath("COMMITTED").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_data_worker_that_is_killed(verb: str, model: Path, tmp_path: Path) -> None:
    """As by the kernel, where memory is short: one line and exit 5, in the status of the run, too."""
    (shard,) = ASSETS.glob("noto-test-*.tar")
    for number in range(40):
        shutil.copy(shard, tmp_path / f"test-{number:02d}.tar")
    suite = [{"name": "x", "shards": [str(tmp_path / "test-*.tar")], "shift": "id"}]
    values = short(model, tmp_path, "single", training={"steps": 5000}, data={"workers": 2}, checkpoint={})
    values["evaluation"] = {"suite": suite, "batch_samples": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "digrap_scale", verb, str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
        until = time.monotonic() + 100
        while len(workers := children.read_text().split()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(int(workers[1]), 9)
        printed = job.communicate(timeout=100)[0]
    assert job.returncode == 5 and "Traceback" not in printed, printed
    assert "a data worker was killed (DataLoader worker (pid" in printed.splitlines()[-1]
    if verb == "train":
        assert status(tmp_path)[:2] == ("failed", 5)


@pytest.mark.slow
def test_torchrun_waits_for_a_long_save(model: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun itself, which by default would kill after 30 s; `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` as launch/ sets it."""
    file = tmp_path / "run.yaml"
    training, sharding = {"steps": 5000}, {"reduce_timeout_s": 200}
    file.write_text(yaml.safe_dump(short(model, tmp_path, training=training, sharding=sharding, checkpoint={})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fault = {"rank": 1, "after": 0, "at": "generators", "do": "sleep", "seconds": 40}
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "FAULT": json.dumps(fault)}
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(
            [*command, "-m", "tests.distributed.faulty", "train", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < until:
            time.sleep(0.2)
        asked = time.monotonic()
        job.terminate()
        job.wait(timeout=300)
    assert time.monotonic() - asked > 35
    state, code, reason = status(tmp_path)
    assert (state, code) == ("preempted", 75), (reason, (tmp_path / "output").read_text())
    assert step_folder(tmp_path / "run", int(reason.split()[-1])).joinpath("COMMITTED").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("at", "step"), [("optimizer step", 3), ("tensors", 4), ("commit", 4)])
def test_sigterm_anywhere(
    at: str, step: int, model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    values = short(model, tmp_path)
    launch(values, tmp_path, {"rank": 0, "step": step, "at": at, "do": "SIGTERM"})
    saved = 3 if at == "optimizer step" else 5  # asked to stop while step 4 is saved: the next step's end is the place
    assert status(tmp_path) == ("preempted", 75, f"preempted; saved step {saved}")
    check_goes_on(tmp_path, values, undisturbed, f"resumed from step-{saved}")


@pytest.mark.slow
def test_a_rank_that_fails_while_building(model: Path, tmp_path: Path) -> None:
    """torchrun ends rank 0 for it with SIGTERM; the reason is still the other's error."""
    fault = {"rank": 1, "step": 0, "at": "building", "do": "raise"}
    printed = launch(short(model, tmp_path), tmp_path, fault)
    state, code, reason = status(tmp_path)
    assert (state, code) == ("failed", 5), (reason, printed)
    assert reason.startswith("rank 1 failed in step 0 (MemoryError: no room for 2 GiB)")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_stopped_rank_is_named(
    signal: str, rank: int, model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    values = short(model, tmp_path)
    printed = launch(values, tmp_path, {"rank": rank, "step": 3, "at": "forward and backward", "do": signal})
    state, code, reason = status(tmp_path)
    assert (state, code) == ("failed", 5), (reason, printed)
    assert f"rank {rank} is dead or stopped (last seen in step" in reason
    assert f"rank {1 - rank} waited for it in step 3, " in reason
    check_goes_on(tmp_path, values, undisturbed, "resumed from step-2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "line"),
    [("tensors", "(ranks 0, 1)"), ("torn", "(ranks 0, 1)"), ("generators", "(rank"), ("checksums", "(not committed)")],
)
def test_killed_while_saving(
    at: str, line: str, model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    values = short(model, tmp_path)
    launch(values, tmp_path, {"rank": 1, "step": 4, "at": at, "do": "SIGKILL"})
    assert not step_folder(tmp_path / "run", 4).joinpath("COMMITTED").exists()
    check_goes_on(tmp_path, values, undisturbed, f"step-4 is incomplete {line}")
    assert "; resuming from step-2" in (tmp_path / "run" / "messages.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "asynchronous"), [("zero3", False), ("fsdp2", True)])
def test_other_ways_to_shard_and_to_save(backend: str, asynchronous: bool, model: Path, tmp_path: Path) -> None:
    """Asked to stop; killed in a step; killed while a file is written: each goes on to the same bits."""
    every = {"every_steps": 2, "asynchronous": asynchronous}
    (tmp_path / "calm").mkdir()
    launch(short(model, tmp_path / "calm", backend, checkpoint=every), tmp_path / "calm")
    expected = tensors_of(step_folder(tmp_path / "calm" / "run", 6))
    faults: list[tuple[str, dict[str, Any], tuple[str, int], str]] = [
        ("term", {"step": 3, "at": "optimizer step", "do": "SIGTERM"}, ("preempted", 75), "resumed from step-3"),
        ("kill", {"step": 5, "at": "forward and backward", "do": "SIGKILL"}, ("failed", 5), "resumed from step-"),
        # Written meanwhile, a file may be torn in a later step than its own.
        ("torn", {"after": 3, "at": "torn", "do": "SIGKILL"}, ("failed", 5), "is incomplete (rank"),
    ]
    for name, fault, ended, line in faults:
        folder = tmp_path / name
        folder.mkdir()
        values = short(model, folder, backend, checkpoint=every)
        printed = launch(values, folder, {"rank": 1, **fault})
        assert status(folder)[:2] == ended, (name, status(folder), printed)
        check_goes_on(folder, values, expected, line)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
def test_torchrun_picks_it_up(step: int, model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """A worker is killed; the agent starts all again (``--max-restarts``). Before the first checkpoint: from the start."""
    fault = {"rank": 1, "step": step, "at": "optimizer step", "do": "SIGKILL", "once": str(tmp_path / "struck")}
    printed = launch(short(model, tmp_path), tmp_path, fault, restarts=1)
    assert (tmp_path / "struck").exists()
    assert status(tmp_path) == ("done", 0, ""), printed
    messages = (tmp_path / "run" / "messages.log").read_text()
    assert ("resumed from step-4" in messages) == (step == 5)
    final = tensors_of(step_folder(tmp_path / "run", 6))
    assert all(torch.equal(final[key], value) for key, value in undisturbed.items())


@pytest.mark.slow
def test_processes_that_do_not_meet(model: Path, tmp_path: Path) -> None:
    """One of two comes; its last line says where it waited, and what torchrun needs after a restart."""
    values = short(model, tmp_path, sharding={"reduce_timeout_s": 5})
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "digrap_scale", "train", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, **place, "TORCHELASTIC_RESTART_COUNT": "1"},
        check=False,
        timeout=120,
    )
    assert done.returncode == 5, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"not all of 2 processes met at 127.0.0.1:{port}; torchrun restarted them: set TORCH_DISABLE_"
    )
    state, code, reason = status(tmp_path)
    assert (state, code) == ("failed", 5) and reason.startswith("not all of 2 processes met")


@pytest.mark.slow
def test_a_reference_that_does_not_fit_is_told_once(model: Path, tmp_path: Path) -> None:
    """All ranks find the same; rank 0 tells, and the run ends with 3, not with one rank missing another."""
    other = tmp_path / "other.safetensors"
    save_file({"something.else": torch.zeros(3)}, other)
    values = short(model, tmp_path, reference={"source": str(other)})
    printed = launch(values, tmp_path)
    assert printed.count("something.else") == 1, printed
    state, code, reason = status(tmp_path)
    assert (state, code) == ("failed", 3) and "something.else" in reason


@pytest.mark.slow
def test_chaos(tmp_path: Path) -> None:
    """A short form of ``make chaos``."""
    assert chaos(3, 2, "fsdp2", tmp_path) == []


def test_a_wrong_reference_is_refused(model: Path, tmp_path: Path) -> None:
    """A checkpoint goes with the reference that it was trained against; another fine-tune of the same shape is told apart."""
    training, schedule = {"steps": 2}, {"warmup_steps": 0}
    every = {"every_steps": 2}
    values = values_of(model, tmp_path / "run", "single", training=training, schedule=schedule, checkpoint=every)
    run_here(values)
    other = tmp_path / "other.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(model / "model.safetensors").items()}, other)
    values["reference"] = {"source": str(other)}
    values["run"]["folder"] = str(tmp_path / "second")
    values["checkpoint"]["resume"] = str(step_folder(tmp_path / "run", 2))
    with pytest.raises(CheckpointError) as caught:
        run_here(values)
    assert f"its reference was {model}" in str(caught.value) and "set reference.source to the one of then" in str(
        caught.value
    )
