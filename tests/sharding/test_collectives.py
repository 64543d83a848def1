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
from digrap_scale.sharding.collectives import _environment, load_collectives

TIMEOUT_S = 240
# A builder as DeepSpeed's own, which compiles in the same way: through torch, under torch's lock.
SMALL = """
import ctypes, os, sys
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import load
from digrap_scale.sharding import collectives

class Builder:
    name = "small"

    def is_compatible(self, verbose):
        return True

    def load(self):
        self.library = ctypes.CDLL(load("small", [sys.argv[1]], is_python_module=False))

builder = Builder()
get_accelerator().create_op_builder = lambda name: builder
collectives._PATIENCE_S = float(os.environ.get("PATIENCE_S", "600"))
collectives.load_collectives(lambda line: print(" ".join(line.split()[:3]), flush=True))
print(builder.library.answer())
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


def at_work(process: subprocess.Popen[str], tmp_path: Path) -> None:
    while not (tmp_path / "at-work").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_a_process_is_killed_while_it_compiles(source: Path, tmp_path: Path) -> None:
    """torch's lock stays, and its compiler is at work: the next process neither waits for the one nor hears of the other."""
    root = tmp_path / "root"
    cxx = compiler(tmp_path, f"[ -e {tmp_path}/at-work ] || {{ touch {tmp_path}/at-work; sleep 60; }}")
    killed = start(SMALL, root, source, CXX=cxx)
    try:
        at_work(killed, tmp_path)
        killed.kill()
        killed.wait()
        assert len(list(root.glob("*/.private-*/small/lock"))) == 1
        assert ended(start(SMALL, root, source, CXX=cxx)) == (0, ["compiling DeepSpeed's collectives", "42"], [])
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
    assert ended(start(SMALL, root, source, CXX=cxx)) == (0, ["42"], [])
    assert runs(tmp_path) == 2
    assert len(list(root.glob("*/small/small.so"))) == 1 and list(root.glob("*/small/lock")) == []


def held(tmp_path: Path) -> Path:
    """A compiler that goes on when there is a file ``go``."""
    return compiler(tmp_path, f"touch {tmp_path}/at-work; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done")


def announced(process: subprocess.Popen[str], line: str) -> None:
    """Wait for its next line."""
    assert process.stdout is not None and process.stdout.readline() == f"{line}\n"


def test_one_process_compiles_and_the_others_wait(source: Path, tmp_path: Path) -> None:
    first = start(SMALL, tmp_path / "root", source, CXX=held(tmp_path))
    at_work(first, tmp_path)
    second = start(SMALL, tmp_path / "root", source, CXX=tmp_path / "cxx")
    announced(second, "compiling DeepSpeed's collectives")
    (tmp_path / "go").touch()
    assert ended(first) == (0, ["compiling DeepSpeed's collectives", "42"], [])
    assert ended(second) == (0, ["42"], [])
    assert runs(tmp_path) == 1
    assert list((tmp_path / "root").glob("*/.private-*")) == []


def test_who_gets_no_lock_compiles_too(source: Path, tmp_path: Path) -> None:
    first = start(SMALL, tmp_path / "root", source, CXX=held(tmp_path))
    at_work(first, tmp_path)
    second = start(SMALL, tmp_path / "root", source, CXX=tmp_path / "cxx", PATIENCE_S=0.1)
    announced(second, "compiling DeepSpeed's collectives")
    announced(second, "compiling, though another")
    (tmp_path / "go").touch()
    assert ended(second) == (0, ["42"], [])
    assert ended(first) == (0, ["compiling DeepSpeed's collectives", "42"], [])
    assert runs(tmp_path) == 2
    assert len(list((tmp_path / "root").glob("*/small/small.so"))) == 1
    assert list((tmp_path / "root").glob("*/.private-*")) == []


@pytest.fixture
def small_builder(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import load

    def compiled() -> None:
        load("small", [str(source)], is_python_module=False)

    builder = SimpleNamespace(name="small", is_compatible=lambda verbose: True, load=compiled)
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
def test_a_second_try_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes what failed for done, under the same name."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(ConfigError):
        patch.setenv("CXX", "/no/compiler")
        load_collectives(print)
    load_collectives(print)


@pytest.mark.usefixtures("small_builder")
def test_no_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(source))
    expected = f"^{source}/digrap_scale-.*: remove it, or set TORCH_EXTENSIONS_DIR to another folder$"
    with pytest.raises(ConfigError, match=expected):
        load_collectives(print)


def test_deepspeed_takes_what_is_loaded(tmp_path: Path) -> None:
    """It compiles nothing itself, never looks at torch's lock in torch's own folder, and what is in its place is not touched."""
    import deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    code, announced, errors = ended(start(REAL, None))
    assert code == 0, errors
    shared = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    place = shared / f"digrap_scale-{_environment(deepspeed)}" / "deepspeed_shm_comm"
    root = tmp_path / "root"
    own = root / place.parent.name / place.name
    shutil.copytree(place, own)  # compiled once for all tests
    (root / "deepspeed_shm_comm").mkdir()
    (root / "deepspeed_shm_comm" / "lock").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").write_text("#!/bin/sh\ncase \"$*\" in *' -c '*|*-shared*) exit 1;; esac\n")
    (tmp_path / "bin" / "c++").chmod(0o755)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in own.iterdir()}
    code, announced, errors = ended(start(REAL, root, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
    assert code == 0, errors
    assert not [line for line in announced if "compiling" in line]
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in own.iterdir()} == before
    assert sorted(path.name for path in root.iterdir()) == ["deepspeed_shm_comm", place.parent.name]
    assert [path.name for path in (root / "deepspeed_shm_comm").iterdir()] == ["lock"]
