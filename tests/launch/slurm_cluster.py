"""A SLURM cluster of two nodes on this machine: Debian's munged, slurmctld and two slurmd, under a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.ranks import free_port

_SEARCHED = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
PROGRAMS = {name: shutil.which(name, path=_SEARCHED) for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")}
NODES = ("n0", "n1")


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Runs it for the block; gives the environment in which SLURM's commands reach it. Must be root.

    Two partitions of the same nodes: jobs of `high` take the place of those in `low`, which are sent SIGTERM, have a minute
    to leave, and go back into the queue.
    """
    for name in ("state", "munge", "log", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    munge = folder / "munge"
    munge.chmod(0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    host, ports = socket.gethostname(), [free_port() for _ in range(1 + len(NODES))]
    lines = {
        "ClusterName": "local",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "AuthInfo": f"socket={munge}/socket",
        "SlurmctldPort": ports[0],
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld",
        "SlurmdLogFile": folder / "log" / "slurmd-%n",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerType": "sched/builtin",
        "SchedulerParameters": "requeue_delay=1",
        "ReturnToService": 2,
        "JobAcctGatherType": "jobacct_gather/none",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    text = "".join(f"{key}={value}\n" for key, value in lines.items())
    for node, port in zip(NODES, ports[1:], strict=True):
        text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000\n"
    nodes = ",".join(NODES)
    text += f"PartitionName=low Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60\n"
    text += f"PartitionName=high Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF\n"
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    own = [
        f"--{name}={munge}/{name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file", "seed-file")
    ]
    commands = [
        [PROGRAMS["munged"], "--foreground", "--force", f"--socket={munge}/socket", *own],
        [PROGRAMS["slurmctld"], "-D"],
        *([PROGRAMS["slurmd"], "-D", "-N", node] for node in NODES),
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / "log" / f"start-{len(running)}").open("wb") as log:
                running.append(
                    subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)
                )
            time.sleep(1)
        until = time.monotonic() + 30
        while (
            "idle" not in (shown := _run(["sinfo", "-h", "-p", "low", "-o", "%D %t"], environment)) or "2" not in shown
        ):
            if time.monotonic() > until:
                raise AssertionError(f"the nodes do not come up: {shown}{_logs(folder)}")
            time.sleep(0.5)
        yield environment
    finally:
        subprocess.run(["scancel", "-u", "root", "-f"], env=environment, check=False, capture_output=True)
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _run(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _logs(folder: Path) -> str:
    return "".join(f"\n{log.name}: {log.read_text()[-1000:]}" for log in sorted((folder / "log").iterdir()))


def state_of(job: str, environment: dict[str, str]) -> str:
    """PENDING, RUNNING, COMPLETED, …; empty when SLURM has forgotten the job."""
    shown = _run(["scontrol", "show", "job", job], environment)
    return next((word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")), "")
