"""The process's place in the job: rank, device, process group, seeds. The only part of training that knows torch.distributed."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.config.schema import Config
from digrap_scale.environ import environment
from digrap_scale.errors import ConfigError, PeerError, SaveError, brief
from digrap_scale.sharding.collectives import load_collectives
from digrap_scale.training.faults import leave_without_others
from digrap_scale.training.launch import own_environment

Result = TypeVar("Result")
# Files may take hours: rank 0's look at all data, shards that every node fetches. A rank that dies meanwhile is noticed at once.
PREPARATION_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: its number in the job.
        world_size: processes of the job.
        device: where it computes.
    """

    rank: int
    world_size: int
    device: torch.device

    def sum_(self, tensor: torch.Tensor) -> None:
        """Sum over all ranks, in place. Collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers. Collective."""
        number = torch.tensor(value, dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def on_rank_0(self, action: Callable[[], Result], ranks: Ranks | None = None) -> Result:
        """``Ranks.on_first`` (of ``ranks``, or of the job's), where a file that cannot be written is a SaveError. Collective."""

        def act() -> Result:
            try:
                return action()
            except OSError as error:
                raise SaveError(str(error)) from error

        ranks = ranks or Ranks(self.rank, self.world_size, dist.group.WORLD if self.world_size > 1 else None)
        return ranks.on_first(act)

    def same(self, what: str, value: object) -> None:
        """Raise ConfigError on every rank if ``value`` is not the same on all of them. Collective."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                error = ConfigError(
                    f"{what}: rank 0 finds {values[0]}, rank {rank} finds {other}; they must see the same files"
                )
                error.agreed = True
                raise error


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any process group exists (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def place(config: Config) -> Iterator[Place]:
    """Join the job that the launcher (torchrun, deepspeed) started; leave it at the end.

    Raises:
        ConfigError: several processes for ``sharding.backend: single``.
        PeerError: the processes did not meet, or a collective failed because another one is gone or hangs.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), launched_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = config.sharding.backend
    if backend == "single":
        if world_size > 1:
            raise ConfigError(
                f"sharding.backend: single runs one process, but {world_size} were started; set fsdp2, zero1, zero2, zero3 or ddp"
            )
        yield Place(0, 1, _device(local_rank))
        return
    settings = _path(backend)
    if "WORLD_SIZE" not in os.environ:
        # No launcher: a job of one process, in which every backend works as it does in a larger one.
        settings |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    here = Place(rank, world_size, _device(local_rank))
    with environment(settings), _joined(backend, here.device, timedelta(seconds=collective_timeout_s(config))):
        yield here


@contextmanager
def _joined(backend: str, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """The default process group, for the block."""
    with peer_errors(_could_not_meet):
        if backend.startswith("zero"):
            _init_deepspeed(backend, device, timeout)
        else:
            dist.init_process_group(device_id=device if device.type != "cpu" else None, timeout=timeout)
    try:
        with peer_errors():
            yield
    except BaseException as error:
        if _destroying_waits(device) and not getattr(error, "agreed", False):
            leave_without_others(error)
        raise
    finally:
        # A gloo worker thread that still lets go of tensors while the interpreter shuts down aborts the process. With the
        # wrapped model gone (its caller's frame has ended), nothing keeps the groups, and destroying them joins the threads.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
        if backend.startswith("zero") and device.type == "cpu":
            time.sleep(0.2)  # DeepSpeed keeps its groups for good: give their threads the time to finish


@contextmanager
def imagined_place(config: Config, world_size: int) -> Iterator[Place]:
    """Rank 0 of a job of ``world_size`` that has no other ranks: collectives return at once, with this rank's own numbers in
    place of the others'. Shards, buffers and shapes are those of such a job; what is computed means nothing.

    Raises:
        ConfigError: several processes for ``sharding.backend: single``, or this process is one of a real job.
    """
    # Importing it registers torch's "fake" backend. The module is torch's own testing code and not public, but it is what
    # torchtitan's and torch's dry runs are made of, and nothing public takes its place; tests/training/test_dry_run.py
    # fails if it goes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend = config.sharding.backend
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--world-size: a launcher has started this job's processes already; leave the option out")
    if backend == "single":
        raise ConfigError(
            f"sharding.backend: single runs one process, found --world-size {world_size}; set fsdp2, zero1, zero2, zero3 or ddp"
        )
    device = _device(0)
    settings = _path(backend)
    settings |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    with environment(settings):
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        try:
            if backend.startswith("zero"):
                _init_deepspeed(backend, device, timedelta(seconds=collective_timeout_s(config)))
            yield Place(0, world_size, device)
        finally:
            gc.collect()
            dist.destroy_process_group()


def _destroying_waits(device: torch.device) -> bool:
    """NCCL's groups are destroyed by all ranks together: one that fails alone would wait there for good, and say nothing."""
    return device.type != "cpu" and dist.get_world_size() > 1


def _path(backend: str) -> dict[str, str]:
    """DeepSpeed looks for ninja on the PATH, where an environment that is not activated has none, or another one, which
    builds anew what this one's had built."""
    return {"PATH": own_environment()["PATH"]} if backend.startswith("zero") else {}


def imagine_reduction(model: object) -> None:
    """DDP takes the imagined group's empty results for an error of a hook's; its buckets stay as they are instead."""
    if not isinstance(model, DistributedDataParallel):
        return

    def as_it_is(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(
        None, lambda _, bucket: as_it_is(bucket)
    )  # it compares annotations with types, not with text


@contextmanager
def peer_errors(diagnosis: Callable[[], str] = lambda: "another process failed or hangs") -> Iterator[None]:
    """Turn the RuntimeErrors of a collective that another process left into PeerError (``diagnosis`` says which), and those of
    a data worker that was killed."""
    try:
        yield
    except RuntimeError as error:  # gloo raises plain ones; NCCL and the store DistError, a subclass
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _PEER_WORDS):
            raise PeerError(f"{diagnosis()} ({brief(error)})") from error
        if str(error).startswith("DataLoader worker"):
            if threading.current_thread() is threading.main_thread():
                # torch raises at SIGCHLD, and would again when the other workers end, wherever this process then is.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise PeerError(
                f"a data worker was killed ({brief(error)}): out of memory? set data.workers or data.prefetch_batches lower, or "
                "give /dev/shm more room"
            ) from error
        raise


def _could_not_meet() -> str:
    line = f"not all of {os.environ['WORLD_SIZE']} processes met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not os.environ.get(_OWN_STORE):
        # torchrun keeps one store for all its restarts, with the addresses of processes that are gone.
        line += f"; torchrun restarted them: set {_OWN_STORE}=1 beside --max-restarts"
    return line


_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Timed out waiting",
    "Broken pipe",
    "timed out connecting",
)


def collective_timeout_s(config: Config) -> float:
    """How long a collective waits: less than ``sharding.reduce_timeout_s``, so that there is time to find out for whom."""
    return 0.8 * config.sharding.reduce_timeout_s


def limit_collectives(timeout_s: float) -> None:
    """Give the time-out of the job's collectives to every group that this process is in: DeepSpeed's copy of the world and the
    dimensions of a device mesh are made by their libraries, with torch's own of ten (NCCL) or thirty minutes."""
    # Private, both: nothing public lists the groups, and ProcessGroup.set_timeout is not in every torch that we support.
    # tests/distributed/test_launched.py looks at the groups that DeepSpeed and a mesh make.
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_map) if dist.is_initialized() else []:
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def shared_store(here: Place) -> dist.Store:
    """A key-value store of this job's own, held by rank 0. Collective."""
    host = os.environ["MASTER_ADDR"]
    patience = timedelta(seconds=10)
    port: list[Any] = [None]
    store = None
    if here.rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=patience, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    return store or dist.TCPStore(host, port[0], is_master=False, timeout=patience)


def _init_deepspeed(backend: str, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"sharding.backend: {backend} needs DeepSpeed: pip install 'digrap-scale[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel("WARNING")
    if device.type == "cpu":
        load_collectives(lambda line: print(line, file=sys.stderr) if launched_rank() == 0 else None)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else None, timeout=timeout, verbose=False)


def _device(local_rank: int) -> torch.device:
    """This process's accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)


def _free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def choose_operators(config: Config) -> None:
    """``run.deterministic``: torch takes operators that give the same bits every time, or raises an error."""
    torch.use_deterministic_algorithms(config.run.deterministic)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition; read at its first use
        torch.backends.cudnn.benchmark = False
        # Filling new memory with NaN is to find code that reads it; frameworks' buffers have padding that nobody reads.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch; dropout differs between ranks, weights are drawn before from the run's seed alone."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
