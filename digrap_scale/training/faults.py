"""What may befall a run from outside: a request to stop, and processes that die or hang. Each ends with a line that names it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from digrap_scale.errors import DigrapError, PeerError, brief, complain
from digrap_scale.training.status import EXIT_TERMINATED

_LONGEST_PERIOD_S = 5.0
_FAILED = "failed|"
_AGREE_S, _AGREE_PERIOD_S = 5.0, 0.25


class StopRequest:
    """SIGTERM: a scheduler that takes the node away, or a launcher that gives up.

    While steps are taken (``deferred``) it is a flag, to be looked at between two of them, and it stays one when they end
    by an error: who is about to say what happened is not cut short. At other times the process leaves, through the run's
    log, so that its status says so.

    Attributes:
        wanted: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM comes here while the block runs. Outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Steps are taken while the block runs."""
        self._deferred = True
        yield
        self._deferred = False
        if self.wanted:
            sys.exit(EXIT_TERMINATED)

    def hold(self) -> None:
        """From here on it is a flag: this process is about to say what ended it."""
        self._deferred = True

    def _note(self, *_: object) -> None:
        self.wanted = True
        if not self._deferred:
            sys.exit(EXIT_TERMINATED)


class Store(Protocol):
    """A key-value store that all ranks reach (torch's TCPStore)."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read; waits for keys that are not there yet."""


@dataclass
class _Seen:
    beat: bytes
    since: float


class Nobody:
    """The watch of a process without peers."""

    def at(self, step: int, doing: str) -> None:
        """Nobody is told."""

    def diagnosis(self) -> str:
        """Nothing can be said of others."""
        return "no other process is known"

    def failed(self) -> str | None:
        """Nobody else could have failed."""
        return None

    def agree(self, error: DigrapError) -> None:
        """Nobody to agree with."""

    def close(self, error: BaseException | None = None) -> None:
        """Nothing to leave."""

    def stay(self) -> None:
        """Nothing ends this process."""


class Watch(Nobody):
    """Heartbeats: a thread of every rank tells the others that it lives, in which step it is, and what it does.

    A collective that fails or times out does not say whose fault it was; this does. And where a hang cannot be left (a
    collective on an accelerator does not come back to Python), the thread ends the process with exit code 5 itself.

    Args:
        store: shared by all ranks; rank 0 holds it.
        rank, size: of this process, and of the job.
        timeout_s: how long a rank may be silent.
        give_up: called (on the lowest rank that lives) with the line that names the fault, before a process ends itself
            or where rank 0 cannot tell.
        collectives_raise: whether a collective with a rank that is gone raises an error (gloo), or waits (NCCL).
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_s: float,
        give_up: Callable[[str], None],
        collectives_raise: bool = True,
    ) -> None:
        self._collectives_raise = collectives_raise
        self._store, self._rank, self._size, self._timeout_s, self._give_up = store, rank, size, timeout_s, give_up
        self._period_s = min(_LONGEST_PERIOD_S, timeout_s / 10)
        self._place = (0, "starting", time.monotonic())
        self._beats = 0
        # All are known from the start: a rank that dies before its first exchange is missed too.
        first = f"0|0|0|{self._place[1]}"
        store.set(f"beat/{rank}", first)
        self._seen = {other: _Seen(first.encode(), time.monotonic()) for other in range(size)}
        self._store_lost_since: float | None = None
        self._stop = threading.Event()
        self._left = False
        self._last_resort: threading.Timer | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Tell what this rank does from now on."""
        self._place = (step, doing, time.monotonic())

    def agree(self, error: DigrapError) -> None:
        """Before the first step: whether all ranks end by this same error (a reference that does not fit), so that one of them
        telling is enough (``error.agreed``). Waits a few seconds for ranks that are slower."""
        if self._place[0] > 0 or error.agreed or isinstance(error, PeerError):
            return
        self._stop.set()
        self._thread.join(self._period_s)
        reason, until = _reason(error), time.monotonic() + _AGREE_S
        try:
            self._store.set(f"beat/{self._rank}", f"{_FAILED}0|{reason}")
            while not error.agreed and time.monotonic() < until:
                beats = self._store.multi_get([f"beat/{rank}" for rank in range(self._size)])
                error.agreed = all(_failed(beat) == (0, reason) for beat in beats)
                time.sleep(_AGREE_PERIOD_S)
        except RuntimeError:  # rank 0 has left, and nothing more is known
            return
        if error.agreed and self._rank == 0:
            time.sleep(2 * _AGREE_PERIOD_S)  # the store goes with this process: the others are to see it, too
        self._left = error.agreed

    def close(self, error: BaseException | None = None) -> None:
        """This rank leaves: as it should, or by an error that the others do not know of. Those must not wait for it."""
        self._stop.set()
        alone = error is not None and not getattr(error, "agreed", False) and not isinstance(error, PeerError)
        if self._store_lost_since is not None or self._left:
            return
        last = f"{_FAILED}{self._place[0]}|{_reason(error)}" if error and alone else "left"
        self._thread.join(self._period_s)  # its last beat must not come after this one
        with suppress(RuntimeError):  # rank 0, which holds the store, has left before: nobody looks any more
            self._store.set(f"beat/{self._rank}", last)
        if alone and self._rank == 0 and not self._collectives_raise:
            time.sleep(2 * self._period_s)  # the store goes with this process: the others are to read it first

    def failed(self) -> str | None:
        """The line that names the ranks that said they failed, if there are any; one look into the store."""
        self._exchange()
        ranks = [rank for rank, seen in self._seen.items() if rank != self._rank and _failed(seen.beat) is not None]
        return f"{self._names(ranks)}; rank {self._rank} was ended for it" if ranks else None

    def diagnosis(self) -> str:
        """Which rank is silent or behind, in which step, and what this one waited for. Takes up to four periods.

        The process is about to leave: if something keeps it (groups that wait for what will not come), a timer does it.
        """
        line = self._find_out()
        self._last_resort = threading.Timer(max(5.0, 0.2 * self._timeout_s), self._leave, [line])
        self._last_resort.daemon = True
        self._last_resort.start()
        return line

    def stay(self) -> None:
        """The process got out by itself; it goes on after an error that its caller has seen."""
        if self._last_resort is not None:
            self._last_resort.cancel()

    def _find_out(self) -> str:
        step, waited = self._place[0], self._waited()
        silent: list[int] = []
        deadline = time.monotonic() + 4 * self._period_s
        while not silent and time.monotonic() < deadline:
            time.sleep(self._period_s / 2)
            silent = self._silent(2.5 * self._period_s, failed_s=0)
        line = f"{self._names(silent) if silent else self._behind(step)}; {waited}"
        if 0 in silent and self._is_lowest_without(silent):
            self._give_up(line)
        return line

    def _waited(self) -> str:
        return f"rank {self._rank} waited for it in step {self._place[0]}, {self._place[1]}"

    def _is_lowest_without(self, silent: list[int]) -> bool:
        return self._rank == min(set(range(self._size)) - set(silent))

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._exchange()
            # Where a collective with a rank that failed raises, the main thread is to end it: that tells more.
            silent = self._silent(self._timeout_s, failed_s=2 * self._period_s)
            if not silent or self._stop.is_set():
                continue
            line = f"{self._names(silent)}; {self._waited()}"
            if self._is_lowest_without(silent):
                self._give_up(line)
            self._leave(line)  # the main thread hangs in a collective: nothing else ends it

    def _leave(self, line: str) -> None:
        print(f"rank {self._rank}: {line} (exit {PeerError.exit_code})", file=sys.stderr, flush=True)
        os._exit(PeerError.exit_code)

    def _exchange(self) -> None:
        step, doing, since = self._place
        self._beats += 1
        now = time.monotonic()
        try:
            self._store.set(f"beat/{self._rank}", f"{self._beats}|{step}|{now - since:.0f}|{doing}")
            beats = self._store.multi_get([f"beat/{rank}" for rank in range(self._size)])
            self._store_lost_since = None
        except RuntimeError:  # torch's DistError and its kinds: rank 0, which holds the store, does not answer
            self._store_lost_since = self._store_lost_since or now
            return
        for rank, beat in enumerate(beats):
            if self._seen[rank].beat != beat:
                self._seen[rank] = _Seen(beat, now)

    def _silent(self, longer_than_s: float, failed_s: float) -> list[int]:
        """Who has not been heard of for so long, or has said so long ago that it failed."""
        now = time.monotonic()
        if self._store_lost_since is not None and self._rank != 0:
            # The store answers nobody: rank 0 is gone or stopped, of the others nothing is known.
            return [0] if now - self._store_lost_since > min(longer_than_s, self._timeout_s) else []
        return [
            rank
            for rank, seen in self._seen.items()
            if rank != self._rank
            and seen.beat != b"left"
            and now - seen.since > (failed_s if _failed(seen.beat) else longer_than_s)
        ]

    def _names(self, silent: list[int]) -> str:
        words = []
        for rank in silent:
            failed = _failed(self._seen[rank].beat)
            if failed is not None:
                words.append(f"rank {rank} failed in step {failed[0]} ({failed[1]})")
                continue
            place = _parse(self._seen[rank].beat)
            where = f" (last seen in step {place[0]}, {place[2]})" if place is not None else ""
            words.append(f"rank {rank} is dead or stopped{where}")
        return ", ".join(words)

    def _behind(self, step: int) -> str:
        """All live: who is not where the others are."""
        places = {rank: place for rank, seen in self._seen.items() if (place := _parse(seen.beat)) is not None}
        others = {rank: place for rank, place in places.items() if rank != self._rank}
        if not others:
            return "another process failed"
        rank = max(others, key=lambda rank: (others[rank][0] < step, others[rank][1]))
        at, seconds, doing = others[rank]
        return f"rank {rank} does not answer, though it lives: for {seconds} s in step {at}, {doing}"


def leave_without_others(error: BaseException) -> NoReturn:
    """Tell the error and end this process at once, with its exit code: for places where the others would be waited for."""
    code = 1
    if isinstance(error, DigrapError):
        complain(error)
        code = error.exit_code
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {brief(error)}"


def _failed(beat: bytes) -> tuple[int, str] | None:
    """Step and error of a rank that said so."""
    if not beat.startswith(_FAILED.encode()):
        return None
    step, _, reason = beat.decode().removeprefix(_FAILED).partition("|")
    return int(step), reason


def _parse(beat: bytes) -> tuple[int, int, str] | None:
    """Step, seconds there, what it does."""
    parts: list[Any] = beat.decode().split("|", 3)
    return (int(parts[1]), int(parts[2]), parts[3]) if len(parts) == 4 else None
