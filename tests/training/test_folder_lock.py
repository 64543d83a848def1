"""A run's folder has one job at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from digrap_scale import process_lock
from digrap_scale.errors import ConfigError
from digrap_scale.process_lock import ProcessLock
from digrap_scale.training import folder_lock
from digrap_scale.training.folder_lock import LOCK_FILE, FolderLock
from tests.distributed.resume_runs import run_here, values_of
from tests.models.tiny import save_vit

Job = subprocess.Popen[str]

HOLD = """
import os, runpy, sys, time
from pathlib import Path

ProcessLock = runpy.run_path(sys.argv[3])["ProcessLock"]  # without the package, whose import takes seconds
assert ProcessLock(Path(sys.argv[1])).acquire()
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)  # a data worker that outlives its trainer
print("held", flush=True)
if sys.argv[2] == "hold":
    time.sleep(60)
os._exit(0)
"""


@pytest.fixture
def held() -> Iterator[Callable[..., Job]]:
    """Another process that has a folder's lock."""
    jobs: list[Job] = []

    def hold(folder: Path, how: str = "hold") -> Job:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(folder / LOCK_FILE), how, process_lock.__file__]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        assert (stream := jobs[-1].stdout) is not None and stream.readline() == "held\n"
        return jobs[-1]

    yield hold
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A run of six steps."""
    return values_of(save_vit(tmp_path / "vit", classes=16), tmp_path / "run", "single")


def test_a_second_job_leaves_the_first_alone(
    values: dict[str, Any], held: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with a line that says who is there; the status of the run that goes on is not written over."""
    monkeypatch.setattr(folder_lock, "_WAIT_S", 0.1)
    job = held(tmp_path / "run")
    status = json.dumps({"state": "running", "step": 3})
    (tmp_path / "run" / "status.json").write_text(status)
    values["run"]["overwrite"] = True
    with pytest.raises(ConfigError, match=rf"run.folder: .*/run is in use by process {job.pid} on \S+; wait for it"):
        run_here(values)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK_FILE, "status.json"}
    assert (tmp_path / "run" / "status.json").read_text() == status


def test_a_job_that_is_killed_makes_way(
    values: dict[str, Any], held: Callable[..., Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killer = threading.Timer(1.0, held(tmp_path / "run").kill)
    killer.start()
    assert len(run_here(values)) == 6
    killer.join()
    assert "waiting for it to end, at most 120 s" in capfd.readouterr().err
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_it_ends_with_its_process_not_with_a_child(held: Callable[..., Job], tmp_path: Path) -> None:
    assert held(tmp_path, "fork").wait() == 0
    lock = ProcessLock(tmp_path / LOCK_FILE)
    assert lock.acquire()
    lock.release()


def test_a_folder_that_another_job_has_made_meanwhile(held: Callable[..., Job], tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run") as lock:
        lock.wait()
        held(tmp_path / "run")
        with pytest.raises(ConfigError, match="is in use by process"):
            lock.take()
        assert lock.is_elsewhere()


def test_what_a_replaced_folder_links_to_is_left_alone(tmp_path: Path, values: dict[str, Any]) -> None:
    run_here(values)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    values["run"]["overwrite"] = True
    values["optimizer"]["learning_rate"] = 2e-3
    assert len(run_here(values)) == 6
    assert not (tmp_path / "run" / "link").exists() and (tmp_path / "elsewhere" / "kept").exists()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_file_system_without_locks(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert len(run_here(values)) == 6
    assert capfd.readouterr().err.count("its file system has no locks (No locks available)") == 1


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives a file that is removed, but open, another name: it keeps its link, and can be locked."""
    file, lockf, moved = tmp_path / LOCK_FILE, fcntl.lockf, []

    def removed_before(descriptor: int, command: int) -> None:
        if not moved:
            moved.append(file.rename(tmp_path / ".nfs1"))
        lockf(descriptor, command)

    monkeypatch.setattr(process_lock.fcntl, "lockf", removed_before)
    lock = ProcessLock(file)
    assert lock.acquire() and lock.held
    assert file.read_text().startswith(f"process {os.getpid()} ") and moved[0].read_text() == ""
    lock.release()
    assert not file.exists()
