"""The README's main job: zero-shot, fine-tuning three ways on several processes, WiSE-FT, and the table of all five."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from digrap_scale.checkpoint.interpolate import interpolate
from digrap_scale.demo import settings
from digrap_scale.errors import ConfigError, PeerError
from digrap_scale.evaluation.report import ReportRow, print_report, read_report, write_report
from digrap_scale.evaluation.strength import read_strength
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.training.evaluate import evaluate

WISE_ALPHA = 0.5


def demo(folder: str, *, backend: str = "fsdp2", processes: int = 2, steps: int | None = None) -> None:
    """Run the demo under ``folder``; the table and the pictures are written there and shown.

    Raises:
        ConfigError: more processes than accelerators.
        PeerError: a run failed; its own lines, above, say why.
    """
    console = Console(stderr=True)
    steps = steps or settings.STEPS
    if torch.accelerator.is_available() and torch.accelerator.device_count() < processes:
        raise ConfigError(
            f"demo: {processes} processes need as many accelerators, found {torch.accelerator.device_count()}; "
            "pass --processes"
        )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    say("zero-shot evaluation of the shipped foundation model")
    rows = [ReportRow("zero-shot", _evaluate(root / "zero-shot", str(settings.FOUNDATION)))]
    runs = {name: root / method["name"] for name, method in settings.METHODS.items()}
    for name, run in runs.items():
        config_file = root / f"{run.name}.yaml"
        config_file.write_text(settings.make_config(run, settings.METHODS[name], backend=backend, steps=steps)[1])
        command = _command(backend, processes, config_file)
        say(f"{name}: {steps} steps on {processes} processes ({backend}): digrap-scale train {config_file}")
        _run(command, processes, name)
        rows.append(ReportRow(name, read_report(run / "results.json")[0][0].result))
        if name == "FT":
            say(f"WiSE-FT: weights halfway between zero-shot and FT (alpha {WISE_ALPHA})")
            wise = root / "wise_ft"
            interpolate(settings.FOUNDATION, run / "final", wise, [WISE_ALPHA], overwrite=True)
            rows.append(ReportRow(f"WiSE-FT {WISE_ALPHA}", _evaluate(root / "wise-evaluation", str(wise))))
    notes = [
        f"trained on {settings.SOURCE} only; concepts of the test sets are in no training set of any style",
        f"all runs: AdamW, learning rate {settings.LEARNING_RATE:g}, {steps} steps of {settings.BATCH} samples, seed 0, "
        f"{processes} processes ({backend}); strength_lr {settings.STRENGTH_LR:g}",
        "one seed: other random crops move a run by several points, more than the ±, which is the test set's; "
        "nothing was selected on a validation set",
        "emojione-monotone is a line style, like the source: fine-tuning helps there; the others are what it forgets",
    ]
    strength = {name: read_strength(run) for name, run in runs.items()}
    files = write_report(rows, root, notes=notes, strength=strength)
    print_report(rows, notes)
    say("written: " + ", ".join(str(file) for file in files))


def _evaluate(folder: Path, weights: str) -> SuiteResult:
    config, _ = settings.make_config(folder, {"name": "none"}, backend="single", steps=settings.STEPS)
    return evaluate(config, weights, show=False)


def _command(backend: str, processes: int, config_file: Path) -> list[str]:
    """The launcher's command, as a user would type it."""
    job = ["digrap_scale", "train", str(config_file)]
    if backend.startswith("zero"):
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", str(_free_port())]
        return [sys.executable, "-m", *launcher, "--module", *job]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *launcher, *job]


def _run(command: list[str], processes: int, name: str) -> None:
    environment = dict(os.environ)
    # The launchers start `python` and ninja by name: the environment's own come first.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise PeerError(f"demo: the run {name!r} failed; its lines above say why")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
