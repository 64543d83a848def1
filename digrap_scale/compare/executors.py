"""Trials as processes of their own: on this machine, or as jobs of a cluster through submitit."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.compare.grid import Trial
from digrap_scale.compare.schema import ExecutorConfig
from digrap_scale.config import dump_config
from digrap_scale.errors import EXIT_OK, ConfigError
from digrap_scale.training.launch import VISIBLE_DEVICES, own_environment, torchrun_command
from digrap_scale.version import __version__

# How a command is run: (command, log file, environment beside our own) → exit code.
Start = Callable[[list[str], Path, dict[str, str]], int]
_PATIENCE_S = 120.0  # for a trial that was asked to stop, to save its state


def run_trials(
    trials: Sequence[Trial], settings: ExecutorConfig, folder: Path, say: Callable[[str], None]
) -> dict[Trial, str]:
    """Run all ``trials``, ``settings.trials`` at a time; one that fails stops no other.

    Returns:
        The trials that failed, and why.

    Raises:
        ConfigError: the executor cannot be had as it is configured.
        KeyboardInterrupt: what runs is asked to stop, and saves its state where it has checkpoints.
    """
    failed: dict[Trial, str] = {}
    if not trials:
        return failed
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(settings.trials):
        slots.put(slot)

    # The pool is left last: it waits for what the starter has stopped.
    with ThreadPoolExecutor(settings.trials) as pool, _starter(settings, folder) as start:

        def work(trial: Trial) -> tuple[Trial, int, float]:
            slot, began = slots.get(), time.monotonic()
            try:
                return trial, _run(trial, settings, slot, start), time.monotonic() - began
            finally:
                slots.put(slot)

        futures = [pool.submit(work, trial) for trial in trials]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                trial, code, seconds = future.result()
                say(
                    f"{number}/{len(trials)} {trial.name}: {'done' if code == EXIT_OK else 'FAILED'} in {seconds:.0f} s"
                )
                if code != EXIT_OK:
                    failed[trial] = _reason(trial, code)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _run(trial: Trial, settings: ExecutorConfig, slot: int, start: Start) -> int:
    """One trial; its exit code."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    file = trial.folder / "trial.yaml"
    write_file(file, dump_config(trial.config))
    command = trial_command(trial, settings.ranks, file)
    began = time.time()
    code = start(command, trial.folder / "log.txt", _environment(settings, slot))
    note = {"name": trial.name, "command": command, "exit_code": code, "seconds": round(time.time() - began, 1)}
    write_file(trial.folder / "trial.json", json.dumps({**note, "version": __version__}, indent=1) + "\n")
    return code


def trial_command(trial: Trial, ranks: int, file: Path) -> list[str]:
    """The command of a trial; torchrun's if it has several processes, which keeps to the devices that a trial is given."""
    if ranks == 1:
        return [sys.executable, "-m", "digrap_scale", trial.verb, str(file)]
    return torchrun_command(trial.verb, ranks, file)


def _environment(settings: ExecutorConfig, slot: int) -> dict[str, str]:
    """What trials that run beside each other need: their share of the cores, and accelerators of their own."""
    if settings.name != "local":
        return {}
    cores = os.cpu_count() or 1
    found = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (settings.trials * settings.ranks))))
    }
    if torch.cuda.is_available() and settings.trials > 1:
        given = os.environ.get(VISIBLE_DEVICES, ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        if len(given) < settings.trials * settings.ranks:
            raise ConfigError(
                f"executor: expected {settings.trials} trials × {settings.ranks} ranks to fit {len(given)} accelerators; "
                "lower executor.trials or executor.ranks"
            )
        found[VISIBLE_DEVICES] = ",".join(given[slot * settings.ranks : (slot + 1) * settings.ranks])
    return found


def _reason(trial: Trial, code: int) -> str:
    """Why a trial failed: the last line of its log."""
    log = trial.folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return f"exit {code}: {last[:300]} ({log})"


@contextmanager
def _starter(settings: ExecutorConfig, folder: Path) -> Iterator[Start]:
    if settings.name == "local":
        with _children() as start:
            yield start
        return
    with _jobs(settings, folder) as start:
        yield start


@contextmanager
def _children() -> Iterator[Start]:
    """Processes of this machine; those that still run when the block is left by an error are asked to stop."""
    running: set[subprocess.Popen[bytes]] = set()
    lock, closed = threading.Lock(), threading.Event()

    def start(command: list[str], log: Path, environment: dict[str, str]) -> int:
        with log.open("ab") as stream:
            with lock:
                if closed.is_set():
                    return -1
                process = _spawn(command, stream, environment)
                running.add(process)
            try:
                return process.wait()
            finally:
                running.discard(process)

    try:
        yield start
    except BaseException:
        with lock:
            closed.set()
        _stop(list(running))
        raise


def _spawn(command: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**own_environment(), **environment},
        start_new_session=True,  # a terminal's Ctrl-C is for us, who ask it to stop and save
    )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask them to stop, which saves their state; who has no end in ``_PATIENCE_S``, or is interrupted again, is killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE_S
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks with it: each has a session of its own


def run_command(command: list[str], log: str, environment: dict[str, str]) -> int:
    """What a job of the cluster does: the command, its output in ``log``; its exit code. A cancelled job's command is asked
    to stop first."""
    # submitit's way to cancel; a shell's background jobs ignore it otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab") as stream:
        process = _spawn(command, stream, environment)
        try:
            return process.wait()
        except BaseException:
            _stop([process])
            raise


@contextmanager
def _jobs(settings: ExecutorConfig, folder: Path) -> Iterator[Start]:
    """Jobs of submitit's executor; those that still run when the block is left by an error are cancelled."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("executor.name: `submitit` needs a package: pip install 'digrap-scale[submitit]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=settings.cluster)
        executor.update_parameters(timeout_min=settings.timeout_minutes, name="digrap-compare", **settings.parameters)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"executor: submitit refuses cluster `{settings.cluster}` and its parameters: {error}"
        ) from None
    lock = threading.Lock()
    running: set[Any] = set()
    closed = threading.Event()

    def start(command: list[str], log: Path, environment: dict[str, str]) -> int:
        job = None
        try:
            with lock:
                if closed.is_set():  # it waited for the lock while another one was submitted
                    return -1
                job = executor.submit(run_command, command, str(log), environment)
                running.add(job)
            return int(job.result())
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            with log.open("a", encoding="utf-8") as stream:
                lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                stream.write(f"{'not submitted' if job is None else f'job {job.job_id}'}: {lines[-1]}\n")
            return -1
        finally:
            running.discard(job)

    try:
        yield start
    except BaseException:
        with lock:
            closed.set()
        for job in list(running):
            job.cancel()
        raise
