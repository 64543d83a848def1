"""DeepSpeed's collectives are compiled once, whoever is killed meanwhile. A small source stands in for theirs, but at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.collectives import load_collectives

TIMEOUT_S = 240
# A builder as DeepSpeed's own, which compiles in the same way: through torch, under torch's lock.
SMALL = """
import ctypes, os, sys
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import load
from digrap_scale.sharding import collectives

class Builder:
    def is_compatible(self, verbose):
        return True

    def load(self):
        self.library = load("small", [sys.argv[1]], is_python_module=False)

builder = Builder()
get_accelerator().create_op_builder = lambda name: builder
collectives._SILENT_S = float(os.environ.get("SILENT_S", "60"))
collectives.load_collectives(lambda line: print(" ".join(line.split()[:3]), flush=True))
print(ctypes.CDLL(builder.library).answer())
"""
REAL = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from digrap_scale.sharding.collectives import load_collectives
load_collectives(print)
import deepspeed
deepspeed.init_distributed("gloo", verbose=False)
assert deepspeed.comm.comm.cdb.shm_comm_op is not None
"""


def start(script: str, root: Path | None, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    place = {} if root is None else {"TORCH_EXTENSIONS_DIR": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **place, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    ours = [line for line in err.splitlines() if "Warning" not in line and "cpp_extension.py" not in line]
    return process.returncode, out.splitlines(), ours


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "small.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


def compiler(tmp_path: Path, first: str) -> Path:
    """The compiler, which notes each of its runs on a source and then does ``first``."""
    script = tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo run >> {tmp_path}/runs; {first};; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return script


def test_a_process_is_killed_while_it_compiles(source: Path, tmp_path: Path) -> None:
    """torch's lock stays, and its compiler is at work: the next process neither waits for the one nor hears of the other."""
    root = tmp_path / "root"
    killed = start(SMALL, root, source, CXX=compiler(tmp_path, f"touch {tmp_path}/at-work; sleep 10"))
    try:
        while not (tmp_path / "at-work").exists():
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        assert len(list(root.glob("*/small/lock"))) == 1
        assert ended(start(SMALL, root, source, CXX="c++")) == (0, ["compiling DeepSpeed's collectives", "42"], [])
        assert list(root.glob("*/small/lock")) == []
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
    assert ended(start(SMALL, root, source, CXX="c++")) == (0, ["42"], [])


def test_one_process_compiles_and_who_waits_says_so(source: Path, tmp_path: Path) -> None:
    cxx = compiler(tmp_path, f"touch {tmp_path}/at-work; sleep 6")
    first = start(SMALL, tmp_path / "root", source, CXX=cxx)
    while not (tmp_path / "at-work").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    code, lines, errors = ended(start(SMALL, tmp_path / "root", source, CXX=cxx, SILENT_S=0.1))
    assert (code, errors) == (0, [])
    assert lines == ["compiling DeepSpeed's collectives", "waiting for process", "42"]
    assert ended(first)[0] == 0
    assert len((tmp_path / "runs").read_text().splitlines()) == 1


@pytest.fixture
def small_builder(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import load

    def compiled() -> None:
        load("small", [str(source)], is_python_module=False)

    builder = SimpleNamespace(is_compatible=lambda verbose: True, load=compiled)
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: builder)


@pytest.mark.usefixtures("small_builder")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    expected = r"^DeepSpeed's collectives .* \(.*/no/compiler.*\): a C\+\+ compiler .* and ninja"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_collectives(print)
    assert len(caught.value.problems[0].splitlines()) == 1
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


@pytest.mark.usefixtures("small_builder")
def test_no_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(source))
    with pytest.raises(ConfigError, match=f"^{source}/digrap_scale-.*; set TORCH_EXTENSIONS_DIR to another folder$"):
        load_collectives(print)


def test_deepspeed_takes_what_is_loaded(tmp_path: Path) -> None:
    """It compiles nothing itself, and never looks at torch's lock in torch's own folder."""
    from torch.utils.cpp_extension import get_default_build_root

    code, _, errors = ended(start(REAL, None))
    assert code == 0, errors
    own = next(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("digrap_scale-*"))
    shutil.copytree(own, tmp_path / own.name)  # compiled once for all tests
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    code, announced, errors = ended(start(REAL, tmp_path))
    assert code == 0, errors
    assert not [line for line in announced if "compiling" in line]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deepspeed_shm_comm", own.name]
    assert [path.name for path in (tmp_path / "deepspeed_shm_comm").iterdir()] == ["lock"]
