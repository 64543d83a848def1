"""The command line with faults, for tests: ``python -m tests.distributed.faulty train …``.

``FAULT`` (JSON): {"rank": 1, "step": 3, "at": "forward and backward" | "optimizer step" | "data" | a phase of a save,
"do": a signal's name, "raise", or "sleep" for so many "seconds"}. Phases: "state" (the first file is there), "tensors",
"torn" (a tensor is in its file, others are not), "generators", "checksums", "commit", "mark" (between COMMITTED and what
follows), "removal" (of an older checkpoint). "building" comes before step 1, in step 0. With "once", a file's name, it strikes
once.

``CHAOS`` (JSON): {"kills": 50, "seed": 0, "noted": a file}: under ``torchrun --max-restarts``, a fault that is drawn anew
at every start until so many have struck: SIGKILL on some rank, one to four steps after where it began.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import filesystem

from digrap_scale.checkpoint import layout, save
from digrap_scale.cli import main
from digrap_scale.training import run
from digrap_scale.training.faults import Nobody, Watch

PLACES = (
    "data",
    "forward and backward",
    "optimizer step",
    "state",
    "tensors",
    "torn",
    "generators",
    "checksums",
    "commit",
    "mark",
)
OF_RANK_0 = ("state", "commit", "mark")


class Fault:
    """What strikes, and when: in ``step``, or as soon as it can from so many steps ``after`` the first of this start."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.step, self.first = fault, 0, 0

    def strike(self, at: str) -> None:
        fault = self.fault
        self.first = self.first or self.step
        now = self.step == fault["step"] if "step" in fault else self.first and self.step >= self.first + fault["after"]
        if int(os.environ.get("RANK", "0")) != fault["rank"] or at != fault["at"] or not now:
            return
        if "once" in fault:
            if Path(fault["once"]).exists():
                return
            Path(fault["once"]).touch()
        if "noted" in fault:
            with Path(fault["noted"]).open("a") as file:
                start = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
                file.write(f"start {start}: step {self.step}, rank {fault['rank']}, {at}\n")
        if fault["do"] == "sleep":
            return time.sleep(fault["seconds"])
        if fault["do"] == "raise":
            raise MemoryError("no room for 2 GiB")
        os.kill(os.getpid(), getattr(signal, fault["do"]))


def around(
    owner: Any, name: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Call something before or after a function of the package."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def install(fault: Fault) -> None:
    """Put the fault where it belongs."""

    def at(_: Any, step: int, doing: str) -> None:
        fault.step = step
        fault.strike(doing)

    around(run, "attach_projector", before=lambda *_: fault.strike("building"))
    around(Watch, "at", after=at)
    around(Nobody, "at", after=at)
    around(save, "write_file", after=lambda path, _: fault.strike("state") if path.name == layout.STATE else None)
    for writer in ("write_parts", "write_parts_later"):
        around(save, writer, before=lambda *_: fault.strike("tensors"))
    around(filesystem, "_write_item", after=lambda *_: fault.strike("torn"))
    around(save, "save_file", before=lambda _, path: fault.strike("generators") if path.parent.name == "rng" else None)
    around(layout, "checksum", before=lambda *_: fault.strike("checksums"))
    around(layout, "committed_mark", before=lambda *_: fault.strike("commit"))
    around(save, "write_file", after=lambda path, _: fault.strike("mark") if path.name == layout.COMMITTED else None)
    around(shutil, "rmtree", before=lambda *_: fault.strike("removal"))


def drawn(chaos: dict[str, Any]) -> dict[str, Any] | None:
    """The fault of this start. All ranks read how many there were before any of them can be struck."""
    struck = len(Path(chaos["noted"]).read_text().splitlines())
    if struck >= chaos["kills"]:
        return None
    draw = random.Random(f"{chaos['seed']}/{struck}")
    at = draw.choice(PLACES)
    rank = 0 if at in OF_RANK_0 else draw.randrange(int(os.environ["WORLD_SIZE"]))
    return {"rank": rank, "after": draw.randint(1, 4), "at": at, "do": "SIGKILL", "noted": chaos["noted"]}


if __name__ == "__main__":
    fault = json.loads(os.environ["FAULT"]) if "FAULT" in os.environ else None
    if "CHAOS" in os.environ:
        fault = drawn(json.loads(os.environ["CHAOS"]))
    if fault is not None:
        install(Fault(fault))
    sys.exit(main())
