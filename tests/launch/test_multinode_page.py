"""The commands of docs/multinode.md, as they stand there but for hosts, ports and the number of GPUs, by two launchers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from digrap_scale.training.log import read_status
from tests.distributed.ranks import free_port
from tests.distributed.test_launched import config
from tests.models.tiny import save_vit

PAGE = Path(__file__).parents[2] / "docs" / "multinode.md"
TIMEOUT_S = 500


def command(*marks: str, **changes: str) -> list[str]:
    """The page's one command that has all ``marks``, some of its words replaced."""
    lines = re.findall(r"^\$ (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    (line,) = (line for line in lines if all(mark in line for mark in marks))
    for old, new in changes.items():
        assert old in line, f"{line}: {old}"
        line = line.replace(old, new)
    return shlex.split(line)


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(PAGE.parents[1]), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(nodes: list[subprocess.Popen[str]]) -> None:
    outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(outputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = config(save_vit(tmp_path / "vit", classes=16), tmp_path / "run", sharding={"backend": "fsdp2"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("way", ["static", "c10d", "deepspeed"])
def test_two_nodes(way: str, folder: Path) -> None:
    port, nodes = str(free_port()), []
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    for node in ("0", "1"):
        if way == "static":
            changes = {
                "--node-rank 0": f"--node-rank {node}",
                "per-node 8": "per-node 1",
                "node0": "127.0.0.1",
                "29500": port,
            }
            words = command("--node-rank", **changes)
        elif way == "c10d":
            words = command("--rdzv-backend", **{"per-node gpu": "per-node 1", "node0": "localhost", "29500": port})
        else:
            changes = {"--node_rank 0": f"--node_rank {node}", "node0": "127.0.0.1", "29500": port}
            words = command("--no_ssh", **changes)
        nodes.append(start(words, folder))
    ended(nodes)
    assert (read_status(folder / "run") or {})["state"] == "done" and (folder / "run/final/model.safetensors").is_file()


@pytest.mark.slow
def test_a_lost_node_and_an_elastic_job(folder: Path) -> None:
    """`--nnodes 1:2 --max-restarts`: a node is lost for good, the other goes on alone, from the newest checkpoint."""
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["training"]["steps"] = 60
    values["checkpoint"] = {"every_steps": 5}
    values["sharding"]["reduce_timeout_s"] = 30
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    changes = {"--nnodes 2": "--nnodes 1:2", "--max-restarts 0": "--max-restarts 5", "per-node gpu": "per-node 1"}
    words = command("--rdzv-backend", **changes, **{"node0": "localhost", "29500": str(free_port())})
    first = start(words, folder)
    time.sleep(3)  # the first one holds the rendezvous, so it is the other that is lost
    second = start(words, folder)
    until = time.monotonic() + TIMEOUT_S / 2
    while not list(folder.glob("run/checkpoints/step-*/COMMITTED")):
        assert time.monotonic() < until and first.poll() is None, "no checkpoint came"
        time.sleep(0.2)
    children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    for process in [second.pid, *map(int, children)]:
        os.kill(process, signal.SIGKILL)
    second.communicate(timeout=60)
    ended([first])
    assert (read_status(folder / "run") or {})["state"] == "done"
    assert "resumed from step-" in (folder / "run" / "messages.log").read_text(encoding="utf-8")
