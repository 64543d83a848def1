"""θ₀ that stays in its file: each walk over the layers reads it once more, through a buffer of bounded size.

Two halves of the buffer take turns: while one portion is being used, a thread reads the next into the other half; between
two steps it reads the first two, while forward and backward run. Plain reads at an offset, not a mapping: mapped pages
would count as this process's resident memory until the system takes them back. Shapes: L layers, N local elements.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.reference.placement import Piece
from digrap_scale.reference.store import SafetensorsReader

MIN_BUFFER_BYTES = 1 << 20
CUT_ELEMENTS = 1 << 16  # a layer that does not fit is cut at multiples of this, so that sums run over the same rows
_ALIGNMENT = 64  # bytes; no dtype is wider


@dataclass(frozen=True)
class Source:
    """Where a rank's slice of a layer lies.

    Attributes:
        file: the safetensors file.
        offset: byte of the slice's first element.
        numel: N.
        dtype: its dtype in the file.
    """

    file: Path
    offset: int
    numel: int
    dtype: torch.dtype


# Of a portion: (layer, first element, one past the last) with a source, and layers without one (first = last = -1).
_Cut = tuple[int, int, int]
_WHOLE = -1


@dataclass
class _Half:
    """One half of the buffer: which portion it holds, and what must have happened before it is filled again."""

    bytes: torch.Tensor
    holds: list[_Cut] | None = None
    pieces: list[Piece] = field(default_factory=list)
    in_use: Any = None


class StreamedReference:
    """``ReferenceShards`` that hold nothing but the buffer.

    Args:
        sources_L: a layer's place in its file, or None where it has none (reference zero, or not projected).
        dtypes_L: each layer's weights' dtype; a wider reference is rounded to it.
        buffer_bytes: size of the buffer, both halves together.
        device: where the weights are; for an accelerator the buffer is pinned host memory.

    Raises:
        ConfigError: a buffer of less than 1 MiB.
        CheckpointError: (while streaming) a file that became unreadable or was changed.
    """

    name = "stream"

    def __init__(
        self,
        sources_L: Sequence[Source | None],
        dtypes_L: Sequence[torch.dtype],
        buffer_bytes: int,
        device: torch.device,
    ) -> None:
        if buffer_bytes < MIN_BUFFER_BYTES:
            raise ConfigError(f"reference buffer: expected {MIN_BUFFER_BYTES} bytes or more, found {buffer_bytes}")
        self._sources_L = list(sources_L)
        self._dtypes_L = list(dtypes_L)
        self._on_accelerator = device.type != "cpu"
        total = sum(_aligned(s.numel * s.dtype.itemsize) for s in self._sources_L if s is not None)
        size = min(buffer_bytes // 2, total)
        self._halves = [_Half(torch.empty(size, dtype=torch.uint8, pin_memory=self._on_accelerator)) for _ in range(2)]
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        for source in self._sources_L:
            if source is not None and source.file not in self._files:
                descriptor = os.open(source.file, os.O_RDONLY)
                self._files[source.file] = (descriptor, _stamp(descriptor))
        # Also when nobody calls close(): an attach() that fails half way, a projector that is dropped.
        self._let_go = weakref.finalize(self, _close, [descriptor for descriptor, _ in self._files.values()])
        self._all_layers = self._portions(range(len(self._sources_L)))
        begin: Callable[[], None] | None = None
        if self._on_accelerator:  # a thread begins on device 0, and would make a context of its own there
            begin = partial(torch.accelerator.set_device_index, torch.accelerator.current_device_index())
        self._reader = ThreadPoolExecutor(1, "reference", initializer=begin)
        self._pending: list[Future[None]] = []

    def pieces(self, layers: Sequence[int]) -> Iterator[list[Piece]]:
        whole = len(layers) == len(self._sources_L)
        portions = self._all_layers if whole else self._portions(layers)
        self._settle()
        self._check_files()
        fills: list[Future[None]] = [self._fill(i, portion) for i, portion in enumerate(portions[:1])]
        for number, portion in enumerate(portions):
            if number + 1 < len(portions):  # the half that the portion before this one was in is free again
                fills.append(self._fill(number + 1, portions[number + 1]))
            _result(fills[number])
            half = self._halves[number % 2]
            try:
                yield half.pieces + [Piece(layer, slice(None), None) for layer, first, _ in portion if first == _WHOLE]
            finally:
                if self._on_accelerator:
                    half.in_use = torch.accelerator.current_stream().record_event()

    def is_zero(self, layer: int) -> bool:
        return self._sources_L[layer] is None

    def prefetch(self) -> None:
        if not self._pending:
            self._pending = [self._fill(i, portion) for i, portion in enumerate(self._all_layers[:2])]

    def held_tensors(self) -> list[torch.Tensor]:
        return [half.bytes for half in self._halves]

    def close(self) -> None:
        self._reader.shutdown(wait=True)
        self._let_go()

    def _settle(self) -> None:
        """Wait for what was read ahead; a half that holds the right portion is not read again."""
        pending, self._pending = self._pending, []
        for future in pending:
            _result(future)

    def _portions(self, layers: Sequence[int]) -> list[list[_Cut]]:
        """The layers cut into portions that fit half of the buffer."""
        room = self._halves[0].bytes.numel()
        portions: list[list[_Cut]] = [[]]
        used = 0
        for layer in layers:
            source = self._sources_L[layer]
            if source is None or source.numel == 0:
                portions[-1].append((layer, _WHOLE, _WHOLE))
                continue
            start, width = 0, source.dtype.itemsize
            while start < source.numel:
                left = source.numel - start
                fitting = (room - used) // width
                if _aligned(left * width) <= room - used:
                    stop = source.numel
                elif (cut := min(left, fitting) // CUT_ELEMENTS * CUT_ELEMENTS) > 0:
                    stop = start + cut
                else:
                    portions.append([])
                    used = 0
                    continue
                portions[-1].append((layer, start, stop))
                used += _aligned((stop - start) * width)
                start = stop
        return portions

    def _fill(self, number: int, portion: list[_Cut]) -> Future[None]:
        return self._reader.submit(self._read, self._halves[number % 2], portion)

    def _read(self, half: _Half, portion: list[_Cut]) -> None:
        """On the reading thread: bring ``portion`` into ``half``."""
        if half.holds is portion:
            return
        if half.in_use is not None:
            half.in_use.synchronize()
        half.holds, half.pieces = None, []
        at = 0
        for layer, start, stop in portion:
            source = self._sources_L[layer]
            if start == _WHOLE or source is None:
                continue
            size = (stop - start) * source.dtype.itemsize
            raw = half.bytes[at : at + size]
            self._read_bytes(source, start * source.dtype.itemsize, raw)
            values = raw.view(source.dtype)
            if source.dtype.itemsize > self._dtypes_L[layer].itemsize:
                values = values.to(self._dtypes_L[layer])
            whole = start == 0 and stop == source.numel
            half.pieces.append(Piece(layer, slice(None) if whole else slice(start, stop), values))
            at += _aligned(size)
        half.holds = portion

    def _read_bytes(self, source: Source, skip: int, target: torch.Tensor) -> None:
        view = memoryview(target.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(self._files[source.file][0], [view[done:]], source.offset + skip + done)
            if count == 0:
                raise CheckpointError(f"{source.file}: ends before byte {source.offset + skip + len(view)}")
            done += count

    def _check_files(self) -> None:
        for path, (descriptor, stamp) in self._files.items():
            if _stamp(descriptor) != stamp:
                raise CheckpointError(
                    f"{path}: was written to while it is streamed as the reference; keep it as it is until the run ends"
                )


def find_source(reader: SafetensorsReader, name: str, start: int, stop: int) -> Source:
    """Where elements [start, stop) of the flattened tensor ``name`` lie in the checkpoint's files.

    Raises:
        CheckpointError: a dtype that cannot be streamed.
    """
    file, offset, dtype = reader.locate(name)
    return Source(file, offset + start * dtype.itemsize, stop - start, dtype)


def _result(future: Future[None]) -> None:
    try:
        future.result()
    except OSError as error:
        raise CheckpointError(f"{error.filename or 'reference'}: cannot be read any more ({error})") from error


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
