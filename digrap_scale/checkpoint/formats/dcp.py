"""torch.distributed.checkpoint folders: ``.metadata`` and ``__R_K.distcp`` files, each chunk in them a ``.pt`` file."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what storage_data holds; no public name
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from digrap_scale.checkpoint.atomic import save_error
from digrap_scale.checkpoint.dcp import write_item
from digrap_scale.checkpoint.formats.base import Box, Files, LazyTensor, Source, WriteOptions, boxed, bytes_of
from digrap_scale.checkpoint.formats.huggingface import copy_companions
from digrap_scale.checkpoint.formats.skeleton import empty, save_skeleton
from digrap_scale.checkpoint.formats.zero import pt_offset
from digrap_scale.checkpoint.safe_pickle import METADATA, load_metadata, load_pt
from digrap_scale.errors import CheckpointError

# How a state dict's part for the weights is called, beside one for the optimizer.
_SECTIONS = ("model", "module", "state_dict", "weights")


def detect(path: Path) -> bool:
    return path.is_dir() and (path / METADATA).is_file()


def read(path: Path) -> Source:
    """The weights; other parts (optimizer, counters) are left. Raises: CheckpointError."""
    metadata = load_metadata(path)
    return Source(path, "dcp", tensors_of(path, metadata, _weights(path, metadata)), companions=path)


def tensors_of(folder: Path, metadata: Metadata, names: Mapping[str, str]) -> dict[str, LazyTensor]:
    """The tensors of an open DCP folder: DCP's key → name to give it. Raises: CheckpointError."""
    storage: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {}
    for index, info in metadata.storage_data.items():
        storage[index.fqn, tuple(index.offset or ())] = info
    missing = {info.relative_path for info in storage.values() if not (folder / info.relative_path).is_file()}
    if missing:
        raise CheckpointError(f"{folder / min(missing)}: missing; copy the whole checkpoint")
    files = Files()
    tensors = {}
    for key, name in names.items():
        entry = metadata.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder / METADATA}: {key}: expected a tensor, found another object")
        tensors[name] = _tensor(folder, entry, key, name, storage, files)
    return tensors


def _weights(folder: Path, metadata: Metadata) -> dict[str, str]:
    """DCP's keys of the weights → their names in the model. A flattened key ("model.weight") may be a nested one, or not:
    the planner's data keep the difference."""
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    keys = [key for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)]
    nested = {key: tuple(map(str, paths.get(key, (key,)))) for key in keys}
    for section in _SECTIONS:
        names = {key: ".".join(path[path.index(section) + 1 :]) for key, path in nested.items() if section in path[:-1]}
        if names:
            return names
    outer = {path[0] for path in nested.values() if len(path) > 1}
    if len(outer) > 1:
        raise CheckpointError(
            f"{folder}: expected weights at the top or under {', '.join(_SECTIONS)}; found parts {', '.join(sorted(outer))}"
        )
    if not keys:
        raise CheckpointError(f"{folder}: expected tensors, found none")
    return {key: ".".join(path[1:]) if outer and len(path) > 1 else key for key, path in nested.items()}


def _tensor(
    folder: Path,
    entry: TensorStorageMetadata,
    key: str,
    name: str,
    storage: Mapping[tuple[str, tuple[int, ...]], _StorageInfo],
    files: Files,
) -> LazyTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    # Whether chunks cover the tensor is checked at once; where their data begin takes a look into each, done when needed.
    infos = {}
    for starts, _ in chunks:
        info = storage.get((key, starts)) or storage.get((key, ()))
        if info is None:
            raise CheckpointError(f"{folder / METADATA}: {key}: no file is named for its part at {list(starts)}")
        if info.transform_descriptors:
            raise CheckpointError(
                f"{folder / METADATA}: {key} is stored transformed ({', '.join(info.transform_descriptors)}); save it plainly"
            )
        infos[starts] = info
    boxed(
        name,
        shape,
        dtype,
        [Box(folder / infos[starts].relative_path, 0, starts, sizes) for starts, sizes in chunks],
        files,
    )
    opened: list[LazyTensor] = []

    def read_part(start: int, stop: int) -> torch.Tensor:
        if not opened:
            boxes = [
                Box(
                    folder / infos[starts].relative_path,
                    _data_offset(folder, infos[starts], key, dtype, sizes),
                    starts,
                    sizes,
                )
                for starts, sizes in chunks
            ]
            opened.append(boxed(name, shape, dtype, boxes, files))
        return opened[0].read(start, stop)

    return LazyTensor(name, shape, dtype, read_part)


def _data_offset(folder: Path, info: _StorageInfo, key: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    file = folder / info.relative_path
    with file.open("rb") as opened:
        window = _Window(opened, info.offset, info.length)
        tensor = load_pt(io.BufferedReader(window), name=f"{file}: {key}", data=False)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointError(f"{file}: {key}: expected {dtype} {list(sizes)}, found {found}")
    return int(info.offset) + pt_offset(tensor, file, key)


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + position)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def write(source: Source, folder: Path, options: WriteOptions) -> None:
    """A flat state dict, cut along dim 0 for ``options.world_size`` ranks as FSDP2 does it (DCP loads it at any other).

    PyTorch's own ``FileSystemWriter`` holds all tensors of a file until it is written; here the small parts are its own
    (``torch.save`` of a chunk, plan, ``.metadata``), and the data stream in between. A tied weight is there under each of its
    names, as in ``model.state_dict()``.
    """
    copy_companions(source.companions, folder, source.left_out)
    tensors = dict(source.tensors)
    tensors.update({alias: source.tensors[name] for alias, name in source.aliases.items() if name in tensors})
    ranks = options.world_size or 1
    plans = [SavePlan([]) for _ in range(ranks)]
    for name, tensor in tensors.items():
        for rank, (starts, sizes) in _chunks(tensor.shape, ranks):
            plans[rank].items.append(write_item(name, tensor.shape, tensor.dtype, starts, sizes))
    plans, metadata = create_default_global_save_plan(plans)
    metadata.planner_data = {name: (name,) for name in tensors}
    results = []
    for rank, plan in enumerate(plans):
        path = folder / f"__{rank}_0.distcp"
        with path.open("wb") as file:
            results.append([_write_chunk(file, path, item, tensors[item.index.fqn], options) for item in plan.items])
    writer = FileSystemWriter(folder)
    writer.reset(folder)
    writer.finish(metadata, results)


def _chunks(shape: tuple[int, ...], ranks: int) -> list[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """(rank, (starts, sizes)): rows in equal parts, the last ones smaller or left out; a scalar is rank 0's."""
    if not shape or shape[0] == 0 or ranks == 1:
        return [(0, ((0,) * len(shape), shape))]
    width = -(-shape[0] // ranks)
    starts = [rank * width for rank in range(ranks) if rank * width < shape[0]]
    return [
        (rank, ((start, *(0 for _ in shape[1:])), (min(width, shape[0] - start), *shape[1:])))
        for rank, start in enumerate(starts)
    ]


def _write_chunk(file: BinaryIO, path: Path, item: WriteItem, tensor: LazyTensor, options: WriteOptions) -> WriteResult:
    assert item.tensor_data is not None
    sizes, starts = tuple(item.tensor_data.chunk.sizes), tuple(item.tensor_data.chunk.offsets)
    row = tensor.numel // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
    first = starts[0] * row if starts else 0
    part = LazyTensor(tensor.name, sizes, tensor.dtype, lambda start, stop: tensor.read(first + start, first + stop))
    beside = path.with_suffix(".skeleton")
    try:
        stored = save_skeleton(empty(sizes, tensor.dtype), beside)
        data = pt_offset(stored, beside, tensor.name)
        begin = file.tell()
        with beside.open("rb") as skeleton:
            file.write(skeleton.read(data))
            for piece in part.pieces():
                file.write(bytes_of(piece))
                options.advance(piece.nbytes)
            skeleton.seek(data + part.nbytes)
            file.write(skeleton.read())
        file.flush()
    except OSError as error:
        raise save_error(path, error) from error
    finally:
        beside.unlink(missing_ok=True)
    length = file.tell() - begin
    return WriteResult(item.index, part.nbytes, _StorageInfo(path.name, begin, length))
