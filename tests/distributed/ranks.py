"""Run a function on real processes that form a gloo group, and bring their results back."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from digrap_scale.sharding.collectives import load_collectives

# Imported once, by a server that ranks are forked from: importing is most of what starting a rank costs.
multiprocessing.set_forkserver_preload(["deepspeed", "peft", "transformers", "digrap_scale.training.run"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _worker(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    if "deepspeed" in sys.modules:  # not where ranks are spawned: they import it themselves if they want it
        load_collectives(print)
    dist.init_process_group("gloo")
    try:
        result = function(*args)
        torch.save(result, Path(folder) / f"rank{rank}.pt")
    except BaseException:
        (Path(folder) / f"rank{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        # As in training.setup: with nothing left that holds the groups, destroying them joins gloo's threads. A thread
        # that is still at work while the interpreter shuts down aborts the process.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
        time.sleep(0.2)  # for groups that DeepSpeed keeps


def run_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *args: Any, start_method: str = "forkserver"
) -> list[Any]:
    """``function(*args)`` on ``world_size`` processes; the results in rank order (tensors, dicts, lists, numbers).

    ``start_method="spawn"`` where memory is measured: a forked rank shares what it has imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(
        _worker,
        args=(world_size, free_port(), str(folder), function, args),
        nprocs=world_size,
        join=False,
        start_method=start_method,
    )
    try:
        while not context.join():
            pass
    except mp.ProcessRaisedException as error:
        reports = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
        raise AssertionError(f"a rank failed:\n{reports or error}") from None
    finally:
        for process in context.processes:  # a test that ran out of time leaves none that hang
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
