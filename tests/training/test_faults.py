"""A rank that fails alone: what the others are told, and that it does not wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from digrap_scale.errors import CheckpointError, ConfigError, Preempted
from digrap_scale.training import faults
from digrap_scale.training.faults import Watch
from tests.distributed.ranks import free_port


class MemoryStore:
    """Stands in for the store that all ranks reach."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self._lock:
            return [self._values[key] for key in keys]


class Left(Watch):
    """Notes with which line it would have ended the process."""

    line: str | None = None

    def _leave(self, line: str) -> None:
        self.line = line
        self._stop.set()


@pytest.fixture
def watches() -> list[Left]:
    store, given_up = MemoryStore(), lambda line: None
    return [Left(store, rank, 2, 3.0, given_up, collectives_raise=False) for rank in range(2)]


def wait(for_what: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not for_what() and time.monotonic() < until:
        time.sleep(0.05)


def test_a_rank_that_failed_is_named_with_its_error_at_once(watches: list[Left]) -> None:
    """Its peer hangs in a collective that does not come back: it leaves long before the time-out."""
    waiting, failing = watches
    waiting.at(7, "forward and backward")
    failing.at(7, "forward and backward")
    failing.close(MemoryError("no room for 2 GiB"))
    wait(lambda: waiting.line, 2.5)
    assert waiting.line is not None
    assert "rank 1 failed in step 7 (MemoryError: no room for 2 GiB)" in waiting.line
    assert "rank 0 waited for it in step 7, forward and backward" in waiting.line


def test_who_is_ended_knows_who_failed(watches: list[Left]) -> None:
    """A launcher ends the others of a rank that failed: the reason is that rank's, not the signal."""
    ended, failing = watches
    assert ended.failed() is None
    failing.close(MemoryError("no room for 2 GiB"))
    assert ended.failed() == "rank 1 failed in step 0 (MemoryError: no room for 2 GiB); rank 0 was ended for it"
    ended.close()


def test_all_ranks_with_one_error_need_one_to_tell(watches: list[Left]) -> None:
    """Not where their errors differ, or only some have one: then each tells its own."""
    errors = [CheckpointError("the reference does not fit") for _ in watches]
    threads = [threading.Thread(target=watch.agree, args=[error]) for watch, error in zip(watches, errors, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error.agreed for error in errors] == [True, True]


def test_one_rank_with_an_error_tells_it(watches: list[Left], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_AGREE_S", 0.5)
    error = CheckpointError("on this node alone")
    watches[1].agree(error)
    assert not error.agreed
    watches[1].close(error)
    assert "rank 1 failed in step 0 (CheckpointError: on this node alone)" in (watches[0].failed() or "")
    watches[0].close()


@pytest.mark.parametrize("error", [None, Preempted("preempted; saved step 7"), ConfigError("all see it")])
def test_a_rank_that_leaves_as_all_do_is_not_missed(watches: list[Left], error: ConfigError | None) -> None:
    staying, leaving = watches
    if isinstance(error, ConfigError):
        error.agreed = True
    leaving.close(error)
    wait(lambda: staying.line, 1.5)
    assert staying.line is None
    staying.close()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("ValueError('of rank 1 alone')", 1, "ValueError: of rank 1 alone"),
        ("ConfigError('of rank 1')", 2, "rank 1: of rank 1 (exit 2)"),
    ],
)
def test_it_does_not_wait_for_the_others(error: str, code: int, line: str) -> None:
    """As on accelerators, whose groups are destroyed by all ranks together or never."""
    script = (
        "import time, torch, torch.distributed as dist\n"
        "from digrap_scale.config import parse_config\n"
        "from digrap_scale.errors import ConfigError\n"
        "from digrap_scale.training import setup\n"
        "setup._destroying_waits = lambda device: True\n"
        "dist.destroy_process_group = lambda: time.sleep(1000)\n"
        "class Sharding: backend, reduce_timeout_s = 'ddp', 60\n"
        "class Config: sharding = Sharding()\n"
        "with setup.place(Config()) as here:\n"
        "    dist.barrier()\n"
        f"    if here.rank == 1: raise {error}\n"
        "    time.sleep(1000)\n"
    )
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = ranks[1].communicate(timeout=120)[1]
    finally:
        ranks[0].kill()
        ranks[0].communicate()
    assert ranks[1].returncode == code, printed
    assert line in printed
