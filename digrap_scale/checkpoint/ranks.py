"""What all ranks do together on files: each its part, and what goes wrong on one is known to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from digrap_scale import errors
from digrap_scale.errors import DigrapError, PeerError, brief

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a checkpoint.

    Attributes:
        rank: this one.
        size: how many.
        group: a gloo group of their own, so that a save may go on while others compute; None for one process.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of_job(timeout_s: float) -> Ranks:
        """All processes of the job. Collective."""
        if not dist.is_initialized():
            return Ranks()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return Ranks(dist.get_rank(), dist.get_world_size(), group)

    def any_of(self, flags: int) -> int:
        """The bits that are set on any rank. Collective."""
        if self.group is None:
            return flags
        bits = torch.tensor([flags >> bit & 1 for bit in range(8)], dtype=torch.uint8)
        dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self.group)
        return sum(int(bit) << place for place, bit in enumerate(bits.tolist()))

    def together(self, action: Callable[[], Result]) -> list[Result]:
        """Do ``action`` on every rank; all results, in rank order, on every rank. Collective.

        Raises:
            DigrapError: what the first rank that failed raised, on every rank (with the rank's number, if some did not
                fail); PeerError on the others where it was no error that a user can mend.
        """
        result: Any = None
        failure: tuple[str, list[str]] | None = None
        cause: Exception | None = None
        try:
            result = action()
        except DigrapError as error:
            failure, cause = (type(error).__name__, str(error).splitlines()), error
        except Exception as error:  # a bug, say: the others must not wait for this rank
            failure, cause = ("PeerError", [f"{type(error).__name__}: {brief(error)}"]), error
        gathered: list[Any] = [(result, failure)]
        if self.group is not None:
            gathered = [None] * self.size
            dist.all_gather_object(gathered, (result, failure), group=self.group)
        failed = [rank for rank, (_, failure) in enumerate(gathered) if failure is not None]
        if not failed:
            return [result for result, _ in gathered]
        # That a collective of the action failed on one rank may follow from what another one says.
        failed.sort(key=lambda rank: gathered[rank][1][0] == "PeerError")
        if cause is not None and not isinstance(cause, DigrapError):
            raise cause
        kind, lines = gathered[failed[0]][1]
        if kind == "PeerError":
            raise PeerError(f"rank {failed[0]} failed: {' '.join(lines)}")
        if len(failed) < self.size and self.size > 1 and failed[0] != 0:
            lines = [f"rank {failed[0]}: {lines[0]}", *lines[1:]]
        raised: DigrapError = getattr(errors, kind)(lines if kind == "ConfigError" else "\n".join(lines))
        # A rank whose error is none of ours raises that one, and leaves without the others: they must not wait for it.
        raised.agreed = all(gathered[rank][1][0] != "PeerError" for rank in failed)
        raise raised from cause

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Do ``action`` on rank 0; its result on every rank. Collective. Raises: what it raised, on every rank."""
        return self.together(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]
