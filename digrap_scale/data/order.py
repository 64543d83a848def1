"""The order of an epoch's samples, computed place by place: nothing is streamed, so nothing is replayed after a resume.

An epoch is one sequence of all its samples, the same on every rank, and a function of (seed, epoch, sizes of the
shards) alone. Ranks and workers take parts of it; how much of it is consumed is all that a resume has to know.

It is built in three steps, each of which can be asked for the sample at any place:

1. The tape: the shards laid end to end in an order drawn anew each epoch, begun at a drawn place and wrapped around.
2. Lanes: the tape is cut into equal consecutive lanes, from which the sequence takes blocks of samples in turn. With
   as many lanes as ranks and blocks of a rank's batch, each rank reads a consecutive part of the tape (``data.order:
   local``); with one lane the sequence does not depend on the world size (``global``). What does not fill a block in
   every lane comes last.
3. Windows: within a lane, each run of ``window_samples`` samples is permuted.

The permutation takes the place of a shuffle buffer. A buffer's content depends on all that went through it; a window's
does not. It holds no samples in memory, only their numbers (16 bytes a sample of the window); the price is that samples
are read in the window's order, each with a read of its own. A window should therefore fit the page cache of the node.
"""

# N samples of the epoch, K places asked for

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_KEPT_WINDOWS = 8
_GOLDEN = 0x9E3779B97F4A7C15


def hashed(name: str) -> int:
    """64 bits that depend on ``name`` alone, on any machine and in any version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def permutation(name: str, count: int) -> np.ndarray:
    """[count] int64: 0 … count − 1, sorted by the splitmix64 hash of (name, number).

    Not numpy's own, whose streams may change between versions (NEP 19): a run resumes under another one.
    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        z = np.uint64(hashed(name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class EpochOrder:
    """One epoch's sequence of samples.

    Args:
        counts: samples of each shard; at least one in all.
        seed, epoch, name: draw the order; ``name`` tells several sources apart.
        window_samples: samples that are permuted among themselves; 0 or 1 keeps the tape's order.
        lanes, block_samples: see above.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        seed: int,
        epoch: int,
        window_samples: int,
        lanes: int = 1,
        block_samples: int = 1,
        name: str = "",
    ) -> None:
        self._draw = f"digrap-epoch/{seed}/{name}/{epoch}"
        counts_array = np.asarray(counts, dtype=np.int64)
        self.samples = int(counts_array.sum())
        self._shards = permutation(f"{self._draw}/shards", len(counts))
        self._ends = np.cumsum(counts_array[self._shards])
        self._first = hashed(f"{self._draw}/start") % self.samples
        self._lanes, self._block, self._window = lanes, block_samples, max(1, window_samples)
        self._per_lane = self.samples // (lanes * block_samples) * block_samples
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at places [K] int64 of the sequence, each in [0, N): shard numbers [K], numbers in the shard [K]."""
        block, within = np.divmod(places, self._block)
        lane, in_lane = block % self._lanes, block // self._lanes * self._block + within
        last = places >= self._per_lane * self._lanes
        lane, in_lane = (
            np.where(last, self._lanes, lane),
            np.where(last, places - self._per_lane * self._lanes, in_lane),
        )
        tape = (self._first + lane * self._per_lane + self._permuted(lane, in_lane)) % self.samples
        order = np.searchsorted(self._ends, tape, side="right")
        starts = np.where(order > 0, self._ends[order - 1], 0)
        return self._shards[order], tape - starts

    def _permuted(self, lane: np.ndarray, in_lane: np.ndarray) -> np.ndarray:
        if self._window == 1:
            return in_lane
        window, within = np.divmod(in_lane, self._window)
        result = np.empty_like(in_lane)
        for key in set(zip(lane.tolist(), window.tolist(), strict=True)):
            mine = (lane == key[0]) & (window == key[1])
            result[mine] = key[1] * self._window + self._window_order(*key)[within[mine]]
        return result

    def _window_order(self, lane: int, window: int) -> np.ndarray:
        key = (lane, window)
        if key not in self._windows:
            length = self._per_lane if lane < self._lanes else self.samples - self._per_lane * self._lanes
            size = min(self._window, length - window * self._window)
            self._windows[key] = permutation(f"{self._draw}/{lane}/{window}", size)
            if len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]
