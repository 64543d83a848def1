"""What a run was started with, beside its config: versions, the state of the source, the command. One line a start."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint.atomic import save_error
from digrap_scale.config import Config
from digrap_scale.version import __version__

ENVIRONMENT_FILE = "environment.jsonl"
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "numpy", "pillow")
_GIT_TIMEOUT_S = 10


def note_environment(folder: Path, config: Config, world_size: int) -> None:
    """Append what ``describe_environment`` tells to the run's ``environment.jsonl``; a resumed run has a line a start.

    Raises:
        SaveError: it cannot be written.
    """
    path = folder / ENVIRONMENT_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(describe_environment(config, world_size), ensure_ascii=False) + "\n")
    except OSError as error:
        raise save_error(path, error) from error


def describe_environment(config: Config, world_size: int) -> dict[str, Any]:
    """Time, command, seed, world size, versions, device and git state."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": config.run.seed,
        "deterministic": config.run.deterministic,
        "world_size": world_size,
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": _device(),
        "git": {"working_directory": git_state(Path.cwd()), "package": git_state(Path(__file__).parent)},
    }


def versions() -> dict[str, str]:
    """Package → version, of those that are installed; Python's and CUDA's, too."""
    found = {"python": platform.python_version(), "digrap-scale": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # DeepSpeed is optional
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def git_state(folder: Path) -> Mapping[str, Any] | None:
    """The commit that ``folder``'s repository is at, and how many of its files differ from it; None outside of one, or
    where git is not installed."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """Its model's name; Python tells it on few systems."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
