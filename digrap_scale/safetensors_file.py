"""Where tensors lie in safetensors files: headers checked, file names of an index checked, data not touched."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from digrap_scale.errors import CheckpointError

STEM = "model"
FLOATS = ("F64", "F32", "F16", "BF16")  # those that hold values by themselves; float8 needs scales
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Of the format, but none of torch's that we read.
_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """A stored tensor.

    Attributes:
        file: the file that holds it.
        offset: byte of the file where its data begin.
        code: the format's word for its dtype.
        shape: its shape.
        size_bytes: of its data.
    """

    file: Path
    offset: int
    code: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Raises CheckpointError: a dtype that torch cannot hold."""
        if self.code not in DTYPES:
            raise CheckpointError(
                f"{self.file}: dtype {self.code} is not supported; expected one of {', '.join(DTYPES)}"
            )
        return DTYPES[self.code]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name → entry of a file, in the order of the data, and its ``__metadata__``.

    Raises:
        CheckpointError: not a safetensors file, or a damaged one: the tensor, what was expected and what was found.
    """
    try:
        with file.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            length = int.from_bytes(raw.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"its header takes {length} bytes, the file has {size}" if size >= 8 else f"it has {size} bytes"
                )
            header: Any = json.loads(raw.read(length), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__: expected texts by name")
        entries = [_entry(file, 8 + length, name, value) for name, value in header.items()]
        entries.sort(key=lambda item: (item[1].offset, item[1].size_bytes))
        _check_filled(entries, 8 + length, size)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    return dict(entries), metadata


def _entry(file: Path, data: int, name: str, value: Any) -> tuple[str, Entry]:
    """Raises: ValueError: no entry, or one whose shape is not of the size of its data."""
    try:
        code, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [first, last, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"tensor {name}: expected dtype, shape and two data_offsets, found {str(value)[:100]}"
        ) from error
    bits = DTYPES[code].itemsize * 8 if code in DTYPES else _OTHER_BITS.get(code)
    if bits is None:
        raise ValueError(f"tensor {name}: expected a dtype of the format, found {code!r}")
    if not all(type(number) is int and number >= 0 for number in numbers) or last < first:
        raise ValueError(
            f"tensor {name}: expected a shape and offsets of numbers from 0 on, found {shape}, {first} to {last}"
        )
    if math.prod(shape) * bits != (last - first) * 8:
        taken = f"{math.prod(shape) * bits / 8:g}"
        raise ValueError(f"tensor {name}: {code} {shape} takes {taken} bytes, its data_offsets give {last - first}")
    return name, Entry(file, data + first, code, tuple(shape), last - first)


def _check_filled(entries: Sequence[tuple[str, Entry]], data: int, size: int) -> None:
    """Raises: ValueError where tensors leave a hole, overlap, or end elsewhere than the file."""
    end, before = data, "the header"
    for name, entry in entries:
        if entry.offset != end:
            what = "a hole" if entry.offset > end else "an overlap"
            raise ValueError(
                f"tensor {name}: expected its data at byte {end}, after {before}, found them at {entry.offset}: {what}"
            )
        end, before = entry.offset + entry.size_bytes, name
        if end > size:
            raise ValueError(f"tensor {name}: ends at byte {end}, the file has {size}")
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file has {size}")


def read_headers(path: Path, stem: str = STEM) -> dict[str, Entry]:
    """Name → entry of a safetensors file, an index, or a folder that holds either (the single file counts where both are
    there, as in transformers).

    Raises:
        CheckpointError: nothing there, a damaged file, an index that names a missing file, one outside its folder, or
            other tensors than its files hold.
    """
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if path.is_dir():
        found = [path / name for name in (single, index) if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: has neither {single} nor {index}; give a folder with safetensors weights")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist; give a folder, a .safetensors file or its index")
    if path.suffix == ".safetensors":
        return read_header(path)[0]
    if path.suffix != ".json":
        raise CheckpointError(f"{path}: expected a .safetensors file or its index (.json)")
    listed_of: dict[str, set[str]] = {}
    for name, file_name in _read_index(path).items():
        listed_of.setdefault(file_name, set()).add(name)
    entries: dict[str, Entry] = {}
    for file_name, listed in listed_of.items():
        header, _ = read_header(path.parent / file_name)
        if listed != set(header):
            raise CheckpointError(
                f"{path}: {file_name} does not hold what the index lists; "
                + differing_names(listed, set(header), "listed", "stored")
            )
        entries.update(header)
    return entries


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with, if the tensors' data follow in this order without gaps.

    Format: 8 bytes little-endian header length, then JSON, padded with spaces to a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_inside(file_name: str) -> bool:
    """Whether a file name that a checkpoint gives stays in its folder, on any system."""
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    absolute = posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    return not absolute and bool(posix.parts) and ".." not in (*posix.parts, *windows.parts)


def differing_names(left: set[str], right: set[str], left_title: str, right_title: str) -> str:
    """``title: names`` of what only one side has, at most a few of each."""
    parts = []
    for title, names in ((left_title, sorted(left - right)), (right_title, sorted(right - left))):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{title}: {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(parts)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors index (JSON with a weight_map): {type(error).__name__}: {error}"
        ) from error
    for name, file_name in items.items():
        if not isinstance(file_name, str) or not is_inside(file_name) or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name} points to {file_name!r}; expected a .safetensors file inside the folder"
            )
        if not (path.parent / file_name).is_file():
            raise CheckpointError(
                f"{path}: tensor {name} is in {file_name}, which is missing; copy the whole checkpoint"
            )
    return items


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return items
