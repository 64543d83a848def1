"""One run that is killed again and again, and one that is not: the same bits at the end.

    python -m tests.distributed.chaos --kills 50 [--ranks 2] [--backend fsdp2] [--folder /tmp/chaos]

``make chaos`` does this. Every kill is SIGKILL on a random rank at a random place of a step or of a save; torchrun starts
the processes again (``--max-restarts``), and they go on from the last good checkpoint. Prints where it struck, and the
verdict; exit status 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from digrap_scale.checkpoint.layout import step_folder
from tests.distributed.resume_runs import tensors_of, values_of
from tests.models.tiny import save_vit

MOST_STEPS_A_START = 6  # a kill comes within four steps of a start, or in the save after them
TIMEOUT_S = 20


def launch(file: Path, ranks: int, kills: int, seed: int, folder: Path) -> list[str]:
    """A whole job under torchrun, with so many kills; returns where they struck."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # Some to spare: a start may find that the port which torchrun chose for it was taken meanwhile.
    command += ["--max-restarts", str(kills + 2 + kills // 10), "--monitor-interval", "0.5"]
    command += ["-m", "tests.distributed.faulty", "train", str(file)]
    noted, output = folder / f"{file.stem}.kills", folder / f"{file.stem}.log"
    noted.touch()
    # A store of its own for every start: docs/checkpoints.md.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment["CHAOS"] = json.dumps({"kills": kills, "seed": seed, "noted": str(noted)})
    with output.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the job failed: see {output}")
    return noted.read_text().splitlines()


def chaos(kills: int, ranks: int, backend: str, folder: Path, seed: int = 0) -> list[str]:
    """The tensors that differ between the two runs at their last step."""
    model = save_vit(folder / "vit", classes=16)
    steps = MOST_STEPS_A_START * (kills + 1)
    for name, count in (("disturbed", kills), ("undisturbed", 0)):
        every = {"every_steps": 2, "keep_last": 2}
        sections = {"training": {"steps": steps}, "checkpoint": every, "sharding": {"reduce_timeout_s": TIMEOUT_S}}
        values = values_of(model, folder / name, backend, **sections)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        struck = launch(file, ranks, count, seed, folder)
        print("\n".join([f"{name}: {steps} steps, {len(struck)} kills", *(f"  {line}" for line in struck)]), flush=True)
        assert len(struck) == count, "a kill that was drawn did not come"
    for line in (folder / "disturbed" / "messages.log").read_text().splitlines():
        if "incomplete" in line or "resumed" in line:
            print(line)
    ours, theirs = (tensors_of(step_folder(folder / name, steps)) for name in ("disturbed", "undisturbed"))
    assert set(ours) == set(theirs)
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


def main() -> int:
    parser = argparse.ArgumentParser(description="kill a run again and again; compare it with one that was left alone")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", default="fsdp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    differing = chaos(options.kills, options.ranks, options.backend, folder, options.seed)
    print(f"{len(differing)} tensors differ" if differing else "equal in every bit: weights, moments, ω")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
