"""What a reader of a checkpoint format yields and a writer takes: named tensors that are read a piece at a time.

Every format here keeps tensors as plain little-endian bytes inside files, so a reader tells where they are (``Box``), and the
bytes are read at their offsets: no mapping, whose pages would count as memory, and no tensor is whole unless asked for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint.formats import buffers
from digrap_scale.errors import CheckpointError

PIECE_BYTES = 32 << 20
_OPEN_FILES = 128


@dataclass(frozen=True)
class Box:
    """A part of a tensor that lies in a file, C-contiguous: elements ``[starts, starts + sizes)`` of every dim."""

    file: Path
    offset: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class LazyTensor:
    """A named tensor of a checkpoint.

    Attributes:
        name: its name there.
        shape: its shape.
        dtype: of what ``read`` gives.
        read: (start, stop) → elements [start, stop) of the flattened tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """All elements in order, a bounded number at a time."""
        step = max(1, piece_bytes // self.dtype.itemsize)
        for start in range(0, self.numel, step):
            yield self.read(start, min(start + step, self.numel))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same in another dtype, if it is a floating-point tensor."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        read = self.read
        return replace(
            self, dtype=dtype, read=lambda start, stop: buffers.empty(stop - start, dtype).copy_(read(start, stop))
        )


@dataclass
class Source:
    """An open checkpoint.

    Attributes:
        path: what was opened.
        format: the reader's name.
        tensors: name → tensor, in the checkpoint's order.
        aliases: further names of tensors that are stored once (tied weights) → the name that is stored.
        companions: a folder whose small files (config, processor, tokenizer) belong to the weights, or None.
        left_out: names of companions that do not go with these weights (the adapter's config, once it is merged).
        metadata: facts for the writer of the same format.
    """

    path: Path
    format: str
    tensors: dict[str, LazyTensor]
    aliases: dict[str, str] = field(default_factory=dict)
    companions: Path | None = None
    left_out: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same with some tensors under other names."""
        tensors = {}
        for name, tensor in self.tensors.items():
            new = names.get(name, name)
            if new in tensors:
                raise CheckpointError(f"{self.path}: two tensors would be named {new!r}")
            tensors[new] = replace(tensor, name=new)
        aliases = {names.get(alias, alias): names.get(name, name) for alias, name in self.aliases.items()}
        return replace(self, tensors=tensors, aliases=aliases)


@dataclass(frozen=True)
class WriteOptions:
    """What a writer is asked for.

    Attributes:
        world_size: ranks to write for, or None: the format's usual.
        max_shard_bytes: largest weight file, where the format has a choice (a larger tensor gets a file of its own).
        advance: called with the number of bytes that were written.
    """

    world_size: int | None = None
    max_shard_bytes: int = 4 << 30
    advance: Callable[[int], None] = lambda count: None


class OpenFiles:
    """Descriptors of files, a bounded number of them open at a time.

    Args:
        flags: of ``os.open``.
    """

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, file: Path) -> int:
        """To be used before the next one is asked for. Raises: OSError."""
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, self._flags)
        return self._open[file]

    def close(self) -> None:
        """All of them."""
        while self._open:
            os.close(self._open.popitem()[1])


class Files:
    """Plain reads at an offset from a few open files."""

    def __init__(self) -> None:
        self._open = OpenFiles(os.O_RDONLY)
        weakref.finalize(self, self._open.close)

    def read_into(self, file: Path, offset: int, target: torch.Tensor) -> None:
        """Fills a contiguous tensor with the bytes of ``file`` from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        if target.numel() == 0:
            return
        view = bytes_of(target)
        done = 0
        try:
            descriptor = self._open.descriptor(file)
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{file}: ends after {offset + done} bytes, expected at least {offset + len(view)}; fetch it again"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); fetch it again") from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor; no copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def boxed(
    name: str, shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box], files: Files, stored: Sequence[int] = ()
) -> LazyTensor:
    """A tensor that is stored as boxes.

    Args:
        name: its name.
        shape: its shape.
        dtype: of its bytes.
        boxes: where its parts are.
        files: reads them.
        stored: the shape that boxes are meant in, if it is not the tensor's own (``[numel]`` for flat parts).

    Raises:
        CheckpointError: the boxes overlap, leave elements out, or reach beyond the tensor.
    """
    shape, space = tuple(shape), tuple(stored or shape)
    full = [box for box in boxes if box.numel]
    for box in full:
        inside = len(box.starts) == len(space) == len(box.sizes) and all(
            start + size <= whole for start, size, whole in zip(box.starts, box.sizes, space, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{box.file}: {name}: a part of {list(box.sizes)} at {list(box.starts)} is outside of {list(space)}"
            )
    held = sum(box.numel for box in full)
    if held != math.prod(space):
        raise CheckpointError(
            f"{boxes[0].file if boxes else name}: {name}: expected {math.prod(space)} elements, found {held} in its parts"
        )
    full.sort(key=lambda box: box.starts)
    for position, box in enumerate(full):
        for other in full[position + 1 :]:
            if space and other.starts[0] >= box.starts[0] + box.sizes[0]:
                break
            if all(
                a < c + d and c < a + b
                for a, b, c, d in zip(box.starts, box.sizes, other.starts, other.sizes, strict=True)
            ):
                raise CheckpointError(
                    f"{other.file}: {name}: parts at {list(box.starts)} and {list(other.starts)} overlap"
                )

    def read(start: int, stop: int) -> torch.Tensor:
        out = buffers.empty(stop - start, dtype)
        for box in full:
            for first, count, offset in _runs(box, space, dtype.itemsize, start, stop):
                low, high = max(first, start), min(first + count, stop)
                if low < high:
                    files.read_into(box.file, offset + (low - first) * dtype.itemsize, out[low - start : high - start])
        return out

    return LazyTensor(name, shape, dtype, read)


def _runs(box: Box, space: tuple[int, ...], itemsize: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(first element, number of elements, byte in the file) of the box's runs that are contiguous in the tensor too,
    those outside of [start, stop) left out where that is cheap."""
    # Trailing dims that the box has whole, and the one before them, make up a run.
    whole = len(space)
    while whole > 0 and box.sizes[whole - 1] == space[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    count = math.prod(box.sizes[outer:])
    strides = [math.prod(space[dim + 1 :]) for dim in range(len(space))]
    base = sum(index * stride for index, stride in zip(box.starts, strides, strict=True))
    if outer == 0:
        yield base, count, box.offset
        return
    # Along the first dim, skip what lies before and after.
    rows = range(max(0, start // strides[0] - box.starts[0]), min(box.sizes[0], -(-stop // strides[0]) - box.starts[0]))
    per_row = math.prod(box.sizes[1:outer])
    for row in rows:
        for number, index in enumerate(product(*(range(size) for size in box.sizes[1:outer]))):
            first = base + row * strides[0] + sum(i * s for i, s in zip(index, strides[1:outer], strict=True))
            yield first, count, box.offset + (row * per_row + number) * count * itemsize
