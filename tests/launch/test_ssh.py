"""The DeepSpeed launcher over real ssh: pdsh, and an sshd on two loopback addresses."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.ranks import free_port
from tests.distributed.test_launched import config
from tests.models.tiny import save_vit

ROOT = Path(__file__).parents[2]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
HOSTS = ("127.0.0.1", "127.0.0.2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SSHD is None or shutil.which("pdsh") is None or shutil.which("ssh") is None,
        reason="needs ssh, sshd and pdsh (Debian: openssh-server, openssh-client, pdsh)",
    ),
]


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `ssh` reaches the sshd that runs meanwhile, with keys of its own."""
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    addresses = [f"ListenAddress {host}:{port}" for host in HOSTS]
    (folder / "sshd_config").write_text(
        "\n".join(
            [
                *addresses,
                f"HostKey {folder}/host",
                f"AuthorizedKeysFile {folder}/user.pub",
                f"PidFile {folder}/pid",
                "StrictModes no",
                "UsePAM no",
                "PasswordAuthentication no",
                "KbdInteractiveAuthentication no",
                "",
            ]
        )
    )
    (folder / "ssh_config").write_text(
        f"Port {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking accept-new\nLogLevel ERROR\n"
    )
    program = folder / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    program.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, as root, wants an empty folder
    server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE)
    until = time.monotonic() + 20
    while subprocess.run([str(program), HOSTS[1], "true"], capture_output=True, check=False).returncode != 0:
        assert server.poll() is None and time.monotonic() < until, "sshd does not answer"
        time.sleep(0.2)
    try:
        yield program.parent
    finally:
        server.terminate()
        server.wait(20)


def test_two_nodes_over_ssh(ssh: Path, tmp_path: Path) -> None:
    """Started on the first node alone: the same bits as two processes of one node."""
    model, saved = save_vit(tmp_path / "vit", classes=16), {}
    hosts = {"one": "localhost slots=2\n", "two": "".join(f"{host} slots=1\n" for host in HOSTS)}
    own = Path(sys.executable).parent
    # What a process on another node is to have; the launcher reads this file and sends no PATH by itself.
    (tmp_path / ".deepspeed_env").write_text(
        f"PATH={own}:{os.environ['PATH']}\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
    )
    for name, text in hosts.items():
        (tmp_path / name).write_text(text)
        run = tmp_path / f"run-{name}.yaml"
        run.write_text(yaml.safe_dump(config(model, tmp_path / f"run-{name}")))
        environment = {**os.environ, "PATH": f"{ssh}:{own}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"HOSTFILE": str(tmp_path / name), "PORT": str(free_port())}
        if name == "one":
            environment["NODE_RANK"] = "0"
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "deepspeed.sh"), str(run)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        saved[name] = load_file(tmp_path / f"run-{name}" / "final" / "model.safetensors")
        if name == "two":
            assert all(f"{host}: " in done.stdout + done.stderr for host in HOSTS), "pdsh marks each node's lines"
    assert set(saved["one"]) == set(saved["two"])
    assert all(torch.equal(saved["one"][key], saved["two"][key]) for key in saved["one"])
