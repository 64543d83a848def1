"""Memory for pieces of tensors, used again and again.

A fresh block for each piece costs a page fault for every 4 KiB of it, as long as the copy itself; and glibc serves aligned
blocks of up to 32 MiB from the heap, where a freed one can be too small for the next of its size: the heap then grows with
what is read.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

SMALLEST = 1 << 20  # bytes: what is smaller comes from torch
_KEPT = 4  # free blocks
_free: list[np.ndarray] = []


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """As ``torch.empty(numel, dtype=dtype)``. The block is free for the next caller when nothing refers to its storage."""
    nbytes = numel * dtype.itemsize
    if nbytes < SMALLEST:
        return torch.empty(numel, dtype=dtype)
    fitting = [number for number, block in enumerate(_free) if nbytes <= block.nbytes <= 4 * nbytes]
    block = _free.pop(fitting[0]) if fitting else np.empty(nbytes, np.uint8)
    lent = block[:nbytes]  # the tensor's storage refers to this object, and to nothing else of ours
    weakref.finalize(lent, _give_back, block).atexit = False
    return torch.from_numpy(lent).view(dtype)


def _give_back(block: np.ndarray) -> None:
    _free.append(block)
    del _free[:-_KEPT]
