"""Runs as processes of their own: the launchers' commands, as a user would type them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from digrap_scale.errors import ConfigError, PeerError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def timed_lines() -> Callable[[str], None]:
    """Shows lines to the user, with the seconds since now."""
    console, started = Console(stderr=True), time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    return say


def check_accelerators(processes: int) -> None:
    """Raises: ConfigError where there are accelerators, but fewer than processes."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() < processes:
        raise ConfigError(
            f"{processes} processes need as many accelerators, found {torch.accelerator.device_count()}; "
            "pass --processes"
        )


def command_of(backend: str, processes: int, config_file: Path) -> list[str]:
    """The launcher's command for a training, as a user would type it."""
    # DeepSpeed's launcher forgets which devices are visible where it is told a number of them, and takes the first ones.
    if backend.startswith("zero") and not os.environ.get(VISIBLE_DEVICES):
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", str(_free_port())]
        return [sys.executable, "-m", *launcher, "--module", "digrap_scale", "train", str(config_file)]
    return torchrun_command("train", processes, config_file)


def torchrun_command(verb: str, processes: int, config_file: Path) -> list[str]:
    """torchrun's command: any backend, and the devices that are visible."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *launcher, "digrap_scale", verb, str(config_file)]


def own_environment() -> dict[str, str]:
    """Ours, for another process. The launchers start `python` and ninja by name: those beside our interpreter come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def launch(command: list[str], processes: int, name: str) -> None:
    """Run ``command`` to its end, its lines on our terminal.

    Raises:
        PeerError: it failed.
    """
    environment = own_environment()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise PeerError(f"the run {name!r} failed; its lines above say why")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
