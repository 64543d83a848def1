"""Loader processes: what comes from them, in the order of what they were asked for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from digrap_scale.data.orphans import end_with_parent
from digrap_scale.errors import ConfigError
from digrap_scale.types import Batch


@dataclass
class Delivery:
    """A batch on its way from a worker, and the bad samples that are not in it."""

    batch: Batch
    skipped: list[str] = field(default_factory=list)

    def pin_memory(self) -> Delivery:
        """DataLoader calls it where there is an accelerator."""
        return Delivery(self.batch.pin_memory(), self.skipped)


@dataclass(frozen=True)
class Failure:
    """A data error on its way from a worker process, which could only pass on a traceback."""

    problems: list[str]


@contextmanager
def _no_sigterm() -> Iterator[None]:
    """SIGTERM waits while the block runs: processes that start in it begin with it blocked, in all of their threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_rank_alone(_worker: int) -> None:
    """Of a worker: launchers send SIGTERM to all processes of a rank, which needs its workers until it has saved."""
    end_with_parent()  # torch's own look at it does not end a worker whose last batches nobody takes from the pipe
    threading.Thread(target=_end_by, args=(os.getppid(),), daemon=True).start()


def _end_by(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass  # somebody else's
    os._exit(0)


@dataclass(frozen=True)
class Workers:
    """How batches are made.

    Attributes:
        count: loader processes of this rank; 0 makes them in this process.
        prefetch_batches: batches that each of them makes ahead.
    """

    count: int = 0
    prefetch_batches: int = 2

    def run(self, batches: Dataset[Delivery | Failure], places: Iterable[object], seed: int) -> Iterator[Delivery]:
        """The batches of ``places``, in order. Raises: ConfigError: what is wrong with a shard or sample."""
        # Its own generator: starting workers must not draw from the global one, which seeds dropout.
        loader: DataLoader[Delivery | Failure] = DataLoader(
            batches,
            batch_size=None,
            sampler=places,
            num_workers=self.count,
            # Others start a process between, which is not the rank and lets SIGTERM through (forkserver: Python 3.14's default).
            multiprocessing_context="fork" if self.count else None,
            prefetch_factor=self.prefetch_batches if self.count else None,
            pin_memory=torch.accelerator.is_available(),
            generator=torch.Generator().manual_seed(seed),
            in_order=True,
            worker_init_fn=_heed_the_rank_alone,
        )
        with _no_sigterm():
            deliveries = iter(loader)  # starts the workers
        for item in deliveries:
            if isinstance(item, Failure):
                raise ConfigError(item.problems)
            yield item
