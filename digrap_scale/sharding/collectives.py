"""DeepSpeed's C++ collectives for the CPU, compiled at their first use: by one process at a time, whatever became of the last."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from digrap_scale.errors import ConfigError, brief
from digrap_scale.process_lock import ProcessLock

ROOT = "TORCH_EXTENSIONS_DIR"  # torch's own variable: where extensions are compiled
_POLL_S = 0.05
_SILENT_S = 60.0  # about as long as compiling takes


def load_collectives(announce: Callable[[str], None]) -> None:
    """Load what ``deepspeed.init_distributed`` would load on a CPU, and compile it first if it has not been.

    Around each compilation, and each look at whether one is due, torch holds a lock that is a mere file: a process that is
    killed meanwhile leaves it, and every later start waits for it, for good and without a word. Here the compiler's folder is
    ours, and only who holds the kernel's lock on it compiles: torch's lock is then of a process that is gone.

    Args:
        announce: told that the compiler runs, which takes a minute, or what this process waits for.

    Raises:
        ConfigError: there is no compiler, or it fails; the folder cannot be written to, or its file system has no locks.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):  # DeepSpeed goes without them, too
        return
    root = Path(os.environ.get(ROOT) or get_default_build_root())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = root / f"digrap_scale-python{python}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    lock = ProcessLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*/*.so")):
            announce(f"compiling DeepSpeed's collectives for the CPU, once, into {folder}")
        silent_until = time.monotonic() + _SILENT_S
        while not lock.acquire():
            if time.monotonic() > silent_until:
                silent_until = math.inf
                announce(f"waiting for {lock.holder()}, which compiles DeepSpeed's collectives in {folder}")
            time.sleep(_POLL_S)
    except OSError as error:
        without = (
            " (a file system without locks)" if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP) else ""
        )
        raise ConfigError(
            f"{folder}: DeepSpeed's collectives cannot be compiled there: {error}{without}; set {ROOT} to another folder"
        ) from error
    try:
        _discard_abandoned(folder)
        _load(builder, folder)
    finally:
        lock.release()


def _discard_abandoned(folder: Path) -> None:
    """Remove what a killed process was compiling. Its compiler may still be at work: it goes on in a folder that is gone."""
    for left in folder.glob("[!.]*/lock"):
        aside = folder / f".abandoned-{os.getpid()}"
        left.parent.rename(aside)
        shutil.rmtree(
            aside, ignore_errors=True
        )  # that compiler may write into it while it is emptied; nothing reads it


def _load(builder: object, folder: Path) -> None:
    before = os.environ.get(ROOT)
    os.environ[ROOT] = str(folder)
    try:
        builder.load()  # type: ignore[attr-defined]  # DeepSpeed keeps it for its own call in this process
    except RuntimeError as error:
        found = re.search(r"^.*(?:error:|not found|No such file).*$", str(error), re.MULTILINE)
        raise ConfigError(
            f"DeepSpeed's collectives for the CPU could not be compiled ({found[0].strip() if found else brief(error)}): a C++ "
            "compiler (g++, or the one that CXX names) and ninja are needed; or set sharding.backend to fsdp2"
        ) from error
    finally:
        if before is None:
            del os.environ[ROOT]
        else:
            os.environ[ROOT] = before
