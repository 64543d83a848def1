"""DeepSpeed's C++ collectives for the CPU: compiled once, at their first use, whatever became of a process that did so before."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from digrap_scale.environ import environment
from digrap_scale.errors import ConfigError, brief

ROOT = "TORCH_EXTENSIONS_DIR"  # torch's own variable: where extensions are compiled
_PATIENCE_S = 600.0  # for another process that compiles, which takes about one


def load_collectives(announce: Callable[[str], None]) -> None:
    """Load what ``deepspeed.init_distributed`` would load on a CPU, and compile it first if it has not been.

    Around each compilation, and each look at whether one is due, torch holds a lock that is a mere file: a process that is
    killed meanwhile leaves it, and every later start waits for it, for good and without a word. So each process looks, and
    compiles, in a folder of its own; what is complete is renamed into its place, and never changes there.

    Args:
        announce: told that something is compiled, which takes a minute.

    Raises:
        ConfigError: there is no compiler, or it fails; the folder cannot be used.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):  # DeepSpeed goes without them, too
        return
    if installed_ops.get(builder.name) and accelerator_name == get_accelerator().device_name():
        # Compiled when DeepSpeed was installed.
        builder.load()
        return
    folder = Path(os.environ.get(ROOT) or get_default_build_root()) / f"digrap_scale-{_environment(deepspeed)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / builder.name).is_dir():
            _load(builder, folder)
            return
        announce(f"compiling DeepSpeed's collectives for the CPU, once, into {folder}")
        with _turn(folder, announce):
            _load(builder, folder)
    except (OSError, ImportError) as error:
        raise ConfigError(
            f"{folder}: DeepSpeed's collectives cannot be compiled or loaded there ({brief(error)}): remove it, or set {ROOT} to "
            "another folder"
        ) from error


def _environment(deepspeed: Any) -> str:
    """A name for all that what is compiled depends on: versions, and a digest of the installations and the machine's kind."""
    files = [str(module.__file__) for module in (torch, deepspeed)]
    installed = [f"{file} {os.stat(file).st_mtime_ns}" for file in files]
    tools = [sysconfig.get_path("include"), str(sysconfig.get_config_var("SOABI")), os.environ.get("CXX", "")]
    kind = [platform.machine(), *platform.libc_ver()]
    digest = hashlib.sha256("\n".join([*installed, *tools, *kind]).encode()).hexdigest()[:12]
    return f"torch{torch.__version__}-deepspeed{deepspeed.__version__}-{digest}"


@contextmanager
def _turn(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """One process at a time, which is to spare the others the compiler, no more: who does not get the lock goes on without."""
    lock = FileLock(folder / ".lock", timeout=_PATIENCE_S, mode=0o666)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        announce(f"compiling, though another process may do so, too: {brief(error)}")
    try:
        yield
    finally:
        lock.release()


def _load(builder: Any, folder: Path) -> None:
    """Through torch, in a folder that no other process knows; published if it was compiled there."""
    place = folder / builder.name
    private = Path(tempfile.mkdtemp(prefix=".private-", dir=folder))
    own = private / builder.name
    try:
        if place.is_dir():
            _refer(own, place)
        with environment({ROOT: str(private)}):
            builder.load()  # DeepSpeed keeps it for its own call in this process
        # After a failure in this process torch gives it another name, which no other process would look for.
        if not place.is_dir() and (own / f"{builder.name}.so").is_file():
            _publish(own, place)
    except RuntimeError as error:
        found = re.search(r"^.*(?:error:|not found|No such file|No space).*$", str(error), re.MULTILINE)
        raise ConfigError(
            f"DeepSpeed's collectives for the CPU could not be compiled ({found[0].strip() if found else brief(error)}): a C++ "
            "compiler (g++, or the one that CXX names) and ninja are needed; or set sharding.backend to fsdp2"
        ) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)  # NFS keeps what is mapped until it is not


def _refer(own: Path, place: Path) -> None:
    """Links to what was compiled, whose times tell ninja that there is nothing to do; copies of what torch and ninja write."""
    own.mkdir()
    for file in place.iterdir():
        if file.suffix in (".o", ".so"):
            (own / file.name).symlink_to(file.absolute())
        else:
            shutil.copy2(file, own)


def _publish(compiled: Path, place: Path) -> None:
    try:
        compiled.rename(place)
    except OSError:
        if not place.is_dir():  # else another process was first
            raise
