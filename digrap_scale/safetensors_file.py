"""Where tensors lie in safetensors files: headers checked, file names of an index checked, data not touched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from digrap_scale.errors import CheckpointError

STEM = "model"
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

    safetensors itself checks that the tensors fill the file without gaps or overlaps; the header is parsed once more for
    the offsets, which it has no call to tell, and for names given twice.

    Raises:
        CheckpointError: not a safetensors file, or a damaged one.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = dict(opened.metadata() or {})
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header: dict[str, Any] = json.loads(raw.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = value["data_offsets"]
        entries[name] = Entry(file, 8 + length + first, value["dtype"], tuple(value["shape"]), last - first)
    return entries, metadata


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
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
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
