"""Read slices of tensors from safetensors files: a rank touches only the bytes of its own shard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import FLOATS, read_headers
from digrap_scale.types import ShardSpec

COMPARED_ELEMENTS = 1 << 24


class SafetensorsReader:
    """Named tensors of a checkpoint: one safetensors file, an ``…index.json``, or a folder that holds either.

    Headers are checked at once (``safetensors_file.read_headers``); files are memory-mapped, and no data are read before
    ``read``.

    Raises:
        CheckpointError: no such file, a damaged file, an index that does not fit its files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = read_headers(self.path)
        self._handles: dict[Path, Any] = {}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.code for name, entry in self._entries.items()}

    def _handle(self, name: str) -> Any:
        file = self._entries[name].file
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be read any more ({error})") from error
        return self._handles[file]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor ``name``, in its stored dtype: [stop − start].

        Only the rows that the interval touches are read.
        """
        shape = self.shapes[name]
        numel = math.prod(shape)
        stop = numel if stop is None else stop
        assert 0 <= start <= stop <= numel, f"[{start}, {stop}) of {name} with {numel} elements"
        handle = self._handle(name)
        if not shape or start == stop:
            return handle.get_tensor(name).reshape(-1)[start:stop] if not shape else self._empty(handle, name)
        piece = handle.get_slice(name)
        prefix: list[int] = []
        # While the interval lies within one index of the leading dim, descend: a flat partition may be a part of one row.
        for dim, _ in enumerate(shape):
            inner = math.prod(shape[dim + 1 :])
            first, last = start // inner, -(-stop // inner)
            if last - first > 1 or dim == len(shape) - 1:
                rows = piece[(*(slice(i, i + 1) for i in prefix), slice(first, last))]
                return rows.reshape(-1)[start - first * inner : stop - first * inner]
            prefix.append(first)
            start, stop = start - first * inner, stop - first * inner
        raise AssertionError("unreachable")

    def locate(self, name: str) -> tuple[Path, int, torch.dtype]:
        """The file that holds ``name``, the byte where its data begin there, and its dtype.

        Raises:
            CheckpointError: a dtype that is not one of torch's plain floating types.
        """
        entry = self._entries[name]
        if entry.code not in FLOATS:
            raise CheckpointError(
                f"{entry.file}: {name}: expected one of {', '.join(FLOATS)}, found dtype {entry.code}"
            )
        return entry.file, entry.offset, entry.dtype

    def extent(self, name: str) -> tuple[Path, int, int]:
        """The file that holds ``name``, the byte where its data begin there, and how many bytes they are."""
        entry = self._entries[name]
        return entry.file, entry.offset, entry.size_bytes

    @staticmethod
    def _empty(handle: Any, name: str) -> torch.Tensor:
        piece = handle.get_slice(name)
        empty: torch.Tensor = piece[0:0].reshape(-1)
        return empty


def load_slices(
    reader: SafetensorsReader, specs: Sequence[ShardSpec], file_names: Mapping[str, Sequence[str]], device: torch.device
) -> list[torch.Tensor | None]:
    """This rank's part of every layer's reference, in the file's dtype.

    Args:
        reader: the open checkpoint.
        specs: what this rank holds.
        file_names: parameter name → the file's names for it (several for tied weights, which must then be equal);
            parameters that are absent get None.
        device: where to keep the slices.

    Raises:
        CheckpointError: the file's copies of a tied weight differ.
    """
    slices: list[torch.Tensor | None] = []
    for spec in specs:
        names = file_names.get(spec.name)
        if not names:
            slices.append(None)
            continue
        check_tied(reader, spec, names)
        values = reader.read(names[0], spec.start, spec.stop)
        # A slice may alias the file's mapping: keep a copy of these bytes only.
        slices.append(values.clone() if device.type == "cpu" else values.to(device))
    return slices


def check_tied(reader: SafetensorsReader, spec: ShardSpec, names: Sequence[str]) -> None:
    """Whether the file's copies of a tied weight agree in this rank's part; read a bounded piece at a time.

    Raises:
        CheckpointError: they differ.
    """
    for other in names[1:]:
        for start in range(spec.start, spec.stop, COMPARED_ELEMENTS):
            stop = min(start + COMPARED_ELEMENTS, spec.stop)
            if not torch.equal(reader.read(names[0], start, stop), reader.read(other, start, stop)):
                raise CheckpointError(
                    f"{reader.path}: {names[0]!r} and {other!r} differ, but the model ties them into one parameter "
                    f"({spec.name}); untie them in the model's config or mend the file"
                )
