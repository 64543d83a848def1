"""Read slices of tensors from safetensors files: a rank touches only the bytes of its own shard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from digrap_scale.errors import CheckpointError
from digrap_scale.types import ShardSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPARED_ELEMENTS = 1 << 24
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsReader:
    """Named tensors of a checkpoint: one safetensors file, an ``…index.json``, or a folder that holds either.

    Files are memory-mapped; nothing is read before ``read``.

    Raises:
        CheckpointError: no such file, a damaged file, an index that names a missing file or one outside its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file, expected in self._files():
            handle = self._open(file)
            names = set(handle.keys())
            if expected is not None and not expected <= names:
                raise CheckpointError(f"{file}: lacks {sorted(expected - names)[0]!r}, which the index says it holds")
            for name in names if expected is None else expected:
                piece = handle.get_slice(name)
                self._file_of[name] = file
                self.shapes[name] = tuple(piece.get_shape())
                self.dtypes[name] = str(piece.get_dtype())

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        path = self.path
        if path.is_dir():
            found = [path / name for name in (INDEX_NAME, SINGLE_NAME) if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path}: expected {SINGLE_NAME} or {INDEX_NAME} in this folder, found neither")
            path = found[0]
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a safetensors file, an index or a folder, found nothing there")
        if path.suffix == ".safetensors":
            return [(path, None)]
        if not path.name.endswith(".json"):
            raise CheckpointError(f"{path}: expected a .safetensors file or an index (.json)")
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            names_of: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str):
                    raise TypeError(f"{name!r} is mapped to {file!r}")
                names_of.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected an index with a weight_map of names to files ({error})") from error
        for file in names_of:
            if Path(file).name != file:
                raise CheckpointError(
                    f"{path}: names the file {file!r}; expected a plain name in the index's own folder"
                )
            if not (path.parent / file).is_file():
                raise CheckpointError(f"{path}: names the file {file!r}, which is missing")
        return [(path.parent / file, names) for file, names in sorted(names_of.items())]

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
        return self._handles[file]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor ``name``, in its stored dtype: [stop − start].

        Only the rows that the interval touches are read.
        """
        shape = self.shapes[name]
        numel = math.prod(shape)
        stop = numel if stop is None else stop
        assert 0 <= start <= stop <= numel, f"[{start}, {stop}) of {name} with {numel} elements"
        handle = self._handles[self._file_of[name]]
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

        The format is public: eight bytes (little-endian) give the header's length, the header is JSON, and offsets in it
        count from the header's end. safetensors itself has no call that tells them.

        Raises:
            CheckpointError: a dtype that torch has no floating type for.
        """
        file, offset, _ = self.extent(name)
        if self.dtypes[name] not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name}: expected one of {', '.join(_DTYPES)}, found dtype {self.dtypes[name]}"
            )
        return file, offset, _DTYPES[self.dtypes[name]]

    def extent(self, name: str) -> tuple[Path, int, int]:
        """The file that holds ``name``, the byte where its data begin there, and how many bytes they are."""
        file = self._file_of[name]
        if file not in self._headers:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                self._headers[file] = (8 + length, json.loads(opened.read(length)))
        data, header = self._headers[file]
        first, last = header[name]["data_offsets"]
        return file, data + int(first), int(last) - int(first)

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
