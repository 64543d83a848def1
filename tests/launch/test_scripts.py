"""The scripts of ``launch/``: sound shell, what SLURM's does with an exit code, and two nodes on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from digrap_scale.training.log import read_status
from tests.distributed.ranks import free_port
from tests.distributed.test_launched import config
from tests.models.tiny import save_vit

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TIMEOUT_S = 600


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(script)], check=True)


def slurm(tmp_path: Path, status: int, *arguments: str, **variables: str) -> tuple[int, dict[str, str]]:
    """The job's exit code where its tasks end with ``status``, and what was noted: stand-ins for SLURM's own programs."""
    programs = {
        "srun": f'echo "$3" > "$NOTED.kill"; shift 3; SLURM_PROCID=3 SLURM_LOCALID=1 "$@"; exit {status}',
        "scontrol": 'case $1 in show) printf "n7\\nn8\\n";; *) echo "$@" >> "$NOTED";; esac',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > "$NOTED.task"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "NOTED": str(tmp_path / "noted"),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_NTASKS": "4",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        **variables,
    }
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *arguments], env=environment, check=False)
    return done.returncode, {path.name: path.read_text() for path in tmp_path.glob("noted*")}


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (3, False), (143, False)])
def test_slurm_requeues_a_preempted_job_alone(status: int, requeued: bool, tmp_path: Path) -> None:
    """A task sees the numbers that torch needs; ranks that still save are not killed because another one is gone."""
    code, noted = slurm(tmp_path, status, "run.yaml", "a.b=c d")
    assert code == status
    assert noted["noted.task"] == "3 1 4 2 n7 22345 -m digrap_scale train run.yaml a.b=c d\n"
    assert noted["noted.kill"] == "--kill-on-bad-exit=0\n"
    assert noted.get("noted", "") == ("requeue 12345\n" if requeued else "")


def test_slurm_ends_an_evaluation_that_lost_a_task(tmp_path: Path) -> None:
    code, noted = slurm(tmp_path, 5, "run.yaml", "--weights", "final", VERB="evaluate")
    assert code == 5
    assert noted["noted.task"].endswith("-m digrap_scale evaluate run.yaml --weights final\n")
    assert noted["noted.kill"] == "--kill-on-bad-exit=1\n"


def test_kubernetes_manifest_runs_what_torchrun_needs() -> None:
    manifest = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    elastic = manifest["spec"]["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"] and container["args"][:4] == [
        "-m",
        "digrap_scale",
        "train",
        "/run/run.yaml",
    ]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    patience = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])  # of torchrun, before it kills; then the pod's own
    assert 60 < patience < worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert manifest["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])


def start(script: str, variables: dict[str, str], file: Path, *overrides: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(LAUNCH / script), str(file), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights_of(nodes: list[subprocess.Popen[str]], folder: Path) -> dict[str, torch.Tensor]:
    """What the run that these started saved; all of them ended well."""
    outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(outputs)
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize(
    ("script", "variables", "line"),
    [
        ("torchrun.sh", {"NODES": "2"}, "HEAD: expected the first node's name with NODES=2, found nothing"),
        ("deepspeed.sh", {"HOSTFILE": "none"}, "HOSTFILE: expected a file with a line a node, found no none"),
        (
            "deepspeed.sh",
            {"NODE_RANK": "1"},
            "HEAD: expected the first node's name with NODE_RANK and several nodes in",
        ),
    ],
)
def test_a_node_does_not_go_on_alone(script: str, variables: dict[str, str], line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    node = start(script, {"HOSTFILE": str(tmp_path / "hosts"), **variables}, tmp_path / "run.yaml")
    assert line in node.communicate(timeout=TIMEOUT_S)[0] and node.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_launcher_that_is_asked_to_stop(script: str, tmp_path: Path) -> None:
    """SIGTERM to the launcher, as a scheduler sends it: the ranks save, and the same command goes on."""
    values = config(save_vit(tmp_path / "vit", classes=16), tmp_path / "run", training={"steps": 5000})
    values["evaluation"]["suite"], values["checkpoint"] = [], {"every_steps": 5000}
    values["data"]["workers"] = 1  # they get the signal, too
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    variables = {"HOSTFILE": str(tmp_path / "hosts"), "NODE_RANK": "0", "PORT": str(free_port())}
    if script == "torchrun.sh":
        variables = {"PROCESSES_PER_NODE": "2", "PORT": str(free_port())}
    launcher = start(script, variables, tmp_path / "run.yaml", "sharding.backend=fsdp2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < until:
        time.sleep(0.2)
    launcher.terminate()
    printed = launcher.communicate(timeout=TIMEOUT_S)[0]
    status = read_status(tmp_path / "run") or {}
    assert (status["state"], status["exit_code"]) == ("preempted", 75), printed
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']}" / "COMMITTED").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_two_nodes_equal_one(script: str, tmp_path: Path) -> None:
    """Two launchers, as on two hosts, with a process each: the same bits as one launcher with two processes."""
    model, overrides = save_vit(tmp_path / "vit", classes=16), []
    if script == "torchrun.sh":
        overrides = ["sharding.backend=fsdp2"]
        one = [{"NODES": "1", "PROCESSES_PER_NODE": "2", "PORT": str(free_port())}]
        port = str(free_port())
        two = [{"NODES": "2", "PROCESSES_PER_NODE": "1", "HEAD": "localhost", "PORT": port}] * 2
    else:
        hosts = {"one": "localhost slots=2\n", "two": "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"}
        for name, text in hosts.items():
            (tmp_path / name).write_text(text)
        one = [{"HOSTFILE": str(tmp_path / "one"), "NODE_RANK": "0", "PORT": str(free_port())}]
        both = {"HOSTFILE": str(tmp_path / "two"), "HEAD": "127.0.0.1", "PORT": str(free_port())}
        two = [{**both, "NODE_RANK": str(node)} for node in range(2)]
    saved = {}
    for name, nodes in (("one", one), ("two", two)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config(model, tmp_path / f"run-{name}")))
        saved[name] = weights_of([start(script, node, file, *overrides) for node in nodes], tmp_path / f"run-{name}")
    assert set(saved["one"]) == set(saved["two"])
    assert all(torch.equal(saved["one"][key], saved["two"][key]) for key in saved["one"])
