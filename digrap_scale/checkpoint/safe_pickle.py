"""Pickles of checkpoints, read so that nothing in them runs: PyTorch's ``.pt`` files and DCP's ``.metadata``.

A pickle is a program that may call any function. PyTorch's ``weights_only=True`` lets it make tensors and plain data; what
DeepSpeed stores besides is let in by name, and becomes an inert stand-in. ``.metadata`` is read by the plain ``pickle``
module inside PyTorch (2.13), so it is read here first, and PyTorch is given a ``Metadata`` made of checked plain values.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what storage_data holds; no public name
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import is_inside

METADATA = ".metadata"


class StandIn:
    """Takes the place of an object of a checkpoint whose values are wanted, and whose class is not: attributes only."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class Stage(int):
    """DeepSpeed's ``ZeroStageEnum``: its number."""


# What DeepSpeed 0.18 and 0.19 store besides tensors and plain data (found by saving under ZeRO-1, 2, 3 in every precision).
DEEPSPEED_NAMES: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": StandIn,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": StandIn,
    "deepspeed.utils.tensor_fragment.fragment_address": StandIn,
}


def load_pt(file: str | Path | BinaryIO, *, name: str | None = None, data: bool = True) -> Any:
    """The content of a ``.pt`` file, by ``torch.load(weights_only=True)`` and the names of ``DEEPSPEED_NAMES``.

    Args:
        file: path or open file.
        name: what an error calls it (default: the path).
        data: with ``False`` no tensor's data are read: its shape, dtype and ``untyped_storage()._checkpoint_offset``, the
            byte of the file where its storage begins, are there (PyTorch's note on serialization), and nothing else.

    Raises:
        CheckpointError: not such a file, a damaged one, or one that names anything else; nothing of it was run.
    """
    named = name or str(file)
    allowed: list[Any] = [(stand_in, full) for full, stand_in in DEEPSPEED_NAMES.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            if not data:
                with FakeTensorMode():
                    return torch.load(file, weights_only=True)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, str | Path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{named}: refused: {_reason(error)}; only tensors, plain data and DeepSpeed's own records are read, "
            "since a pickle can run any program"
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{named}: missing; copy the whole checkpoint") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{named}: not a readable PyTorch file ({first}); fetch it again") from error


def _reason(error: Exception) -> str:
    """What PyTorch found, without its advice to switch the check off."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is not None:
        return f"it names {found.group(1)}"
    found = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return found.group(1)[:200] if found is not None else "its pickle does more than hold data"


def load_metadata(folder: str | Path, name: str = METADATA) -> Metadata:
    """The ``.metadata`` of a DCP checkpoint, every value checked.

    Raises:
        CheckpointError: missing or damaged; names a class or function beyond DCP's own records, or a file outside the
            folder. Nothing of it was run.
    """
    path = Path(folder) / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); expected a torch.distributed.checkpoint folder"
        ) from error
    try:
        return _metadata(_MetadataUnpickler(content).load(), path)
    except _RefusedName as error:
        raise CheckpointError(
            f"{path}: refused: it names {error}, which no DCP checkpoint needs; a pickle can run any program"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes fail in any way, and none of it is our code
        raise CheckpointError(
            f"{path}: not a readable DCP metadata file ({type(error).__name__}: {error}); fetch it again"
        ) from error


class SafeReader(FileSystemReader):
    """``FileSystemReader`` that trusts no pickle: give it, and ``SafeLoadPlanner``, to every ``dcp.load``.

    Args:
        path: the checkpoint's folder.
        metadata: of it, if it has been loaded already.
    """

    def __init__(self, path: Path, metadata: Metadata | None = None) -> None:
        super().__init__(path)
        self._loaded = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = METADATA if rank is None else f"__{rank}{METADATA}"
        metadata = self._loaded if self._loaded is not None and rank is None else load_metadata(Path(self.path), name)
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """PyTorch's own planner loads what is no tensor with ``weights_only=False``; this one does not."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        load_pt(value, name=f"DCP entry {read_item.dest_index.fqn}")
        value.seek(0)
        super().load_bytes(read_item, value)


class _RefusedName(pickle.UnpicklingError):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    """Records become stand-ins of classes that are new for each file: a BUILD on a class reaches nothing that is shared."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        base = "torch.distributed.checkpoint"
        records = [
            f"{base}.metadata.{cls.__name__}" for cls in (*_RECORDS, MetadataIndex, TensorProperties, StorageMeta)
        ]
        self._stand_ins: dict[str, Any] = {
            full: type(full.rsplit(".", 1)[1], (StandIn,), {}) for full in (*records, f"{base}.filesystem._StorageInfo")
        }
        self._stand_ins |= {
            f"{base}.metadata._MEM_FORMAT_ENCODING": int,
            "torch.Size": tuple,
            "torch.serialization._get_layout": str,
            "collections.OrderedDict": dict,
            **{f"pathlib.{kind}": _joined for kind in ("PosixPath", "WindowsPath", "Path", "PurePosixPath")},
            **{f"pathlib._local.{kind}": _joined for kind in ("PosixPath", "WindowsPath", "Path")},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if f"{module}.{name}" in self._stand_ins:
            return self._stand_ins[f"{module}.{name}"]
        raise _RefusedName(f"{module}.{name}")


_RECORDS = (Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata)


def _joined(*parts: str) -> str:
    return "/".join(map(str, parts))


def _metadata(raw: Any, path: Path) -> Metadata:
    entries = {_text(name): _entry(value) for name, value in raw.state_dict_metadata.items()}
    storage = {}
    for index, info in raw.storage_data.items():
        offset = getattr(index, "offset", None)
        key = MetadataIndex(
            _text(index.fqn), None if offset is None else _numbers(offset), getattr(index, "index", None)
        )
        if not is_inside(_text(info.relative_path)):
            raise CheckpointError(
                f"{path}: {key.fqn} is in {info.relative_path!r}; expected a file inside the checkpoint's own folder"
            )
        transforms = getattr(info, "transform_descriptors", None)
        storage[key] = _StorageInfo(
            info.relative_path,
            _number(info.offset),
            _number(info.length),
            None if transforms is None else [_text(transform) for transform in transforms],
        )
    version = getattr(raw, "version", None)
    return Metadata(
        state_dict_metadata=entries,
        planner_data=_plain(getattr(raw, "planner_data", None)),
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=None if version is None else _text(version),
    )


def _entry(raw: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(raw).__name__ == BytesStorageMetadata.__name__:
        return BytesStorageMetadata()
    dtype = raw.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {dtype!r}")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=_numbers(raw.size),
        chunks=[ChunkStorageMetadata(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in raw.chunks],
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a count, found {value!r}")
    return value


def _numbers(values: Any) -> torch.Size:
    return torch.Size([_number(value) for value in values])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    raise TypeError(f"expected plain data, found {type(value).__name__}")
