"""Parts of tensors to and from torch.distributed.checkpoint: every rank writes its own, and reads what it holds now.

A checkpoint's tensors have their full shapes, whatever cut them: see ``boxes.py``. So it is read on any number of ranks
and any backend, and by other tools.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from digrap_scale.checkpoint.atomic import system_error
from digrap_scale.checkpoint.boxes import boxes_of
from digrap_scale.checkpoint.safe_pickle import SafeReader, load_metadata
from digrap_scale.errors import CheckpointError
from digrap_scale.types import WEIGHTS, TensorPart


def write_item(
    key: str, shape: Sequence[int], dtype: torch.dtype, offsets: Sequence[int], sizes: Sequence[int]
) -> WriteItem:
    """A plan's line for a part of the tensor ``key``: ``sizes`` elements from ``offsets`` on, in every dim of ``shape``."""
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)


class _Parts:
    """The boxes of a rank's parts, and where each is in the flat tensor that is held."""

    def __init__(self, parts: Sequence[TensorPart]) -> None:
        self.parts = {part.key: part for part in parts}
        assert len(self.parts) == len(parts), "a key has two parts"
        self.boxes = {part.key: boxes_of(part.shape, part.start, part.stop) for part in parts}

    def view(self, index: MetadataIndex, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The box at ``index``, as a view of its tensor in ``tensors``."""
        assert index.offset is not None
        box = next(box for box in self.boxes[index.fqn] if box.offsets == tuple(index.offset))
        flat = tensors[index.fqn].narrow(0, box.start - self.parts[index.fqn].start, box.numel)
        return flat.view(box.sizes)


class PartsSavePlanner(SavePlanner):
    """Writes parts: boxes of tensors of full shapes.

    Raises:
        CheckpointError: (on the coordinator) ranks' parts that do not cover a tensor, or overlap.
    """

    def __init__(self, parts: Sequence[TensorPart]) -> None:
        self._parts = _Parts(parts)
        self._tensors: dict[str, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._tensors = state_dict  # copies, if the save is asynchronous

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                write_item(key, part.shape, part.tensor.dtype, box.offsets, box.sizes)
                for key, part in self._parts.parts.items()
                for box in self._parts.boxes[key]
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            if (held := sum(math.prod(chunk.sizes) for chunk in stored.chunks)) != math.prod(stored.size):
                raise CheckpointError(f"{key}: the ranks hold {held} of its {math.prod(stored.size)} elements")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._parts.view(write_item.index, self._tensors)


class PartsLoadPlanner(LoadPlanner):
    """Reads into parts, whatever cut the tensors when they were written; values are cast to the parts' dtypes."""

    def __init__(self, parts: Sequence[TensorPart]) -> None:
        self._parts = _Parts(parts)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._tensors, self._stored = state_dict, metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, part in self._parts.parts.items():
            stored = self._stored[key]
            assert isinstance(stored, TensorStorageMetadata) and tuple(stored.size) == part.shape  # see StoredParts
            boxes = self._parts.boxes[key]
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]
            found = create_read_items_for_chunk_list(key, stored, chunks)
            if sum(math.prod(item.lengths) for item in found) != part.stop - part.start:
                raise CheckpointError(f"{key}: the checkpoint does not hold all of it")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn}: parts are tensors")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._parts.view(read_item.dest_index, self._tensors)
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Written in place."""


_REST = "state_"  # in the names of files without weights


class PartsWriter(dcp.FileSystemWriter):
    """``FileSystemWriter`` into a new folder. Weights and all else go into two files of a rank, so that whoever wants weights
    alone reads, and checks, no moments. Its error on a full disk is the system's: DCP sends the outermost one alone to the
    other ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self._folder = folder
        self._device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if self._device is not None:  # a thread begins on device 0, and would make a context of its own there
            torch.accelerator.set_device_index(self._device)
        files: dict[str, list[WriteItem]] = {"": [], _REST: []}
        for item in plan.items:
            files["" if item.index.fqn.startswith(WEIGHTS) else _REST].append(item)
        written: list[Any] = []
        try:
            for name, items in files.items():
                if items:
                    prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{name}")
                    written += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
            future: torch.futures.Future[list[Any]] = torch.futures.Future()
            future.set_result(written)
            return future
        except RuntimeError as error:
            if (below := system_error(error, self._folder)) is not error:
                raise below from error
            raise


def write_parts(folder: Path, parts: Sequence[TensorPart], group: dist.ProcessGroup | None) -> None:
    """Every rank's parts (already its own shares: see ``TensorPart.own``) into ``folder``. Collective over ``group``."""
    with _unwrapped():
        dcp.save(**_saved(folder, parts, group))


def write_parts_later(folder: Path, parts: Sequence[TensorPart], group: dist.ProcessGroup | None) -> Callable[[], None]:
    """``write_parts`` on a thread, from copies that are made before this returns. Returns what waits for its end, and
    raises its errors."""
    with _unwrapped():
        future: Any = dcp.async_save(**_saved(folder, _apart(parts), group))

    def wait() -> None:
        with _unwrapped():
            future.result()

    return wait


def _apart(parts: Sequence[TensorPart]) -> list[TensorPart]:
    """The parts, without what lies around them in memory: DCP copies the whole storage of a view."""
    ours: Counter[int] = Counter()
    for part in parts:
        ours[part.tensor.untyped_storage().data_ptr()] += part.tensor.nbytes

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Where half of it is ours, a copy that DCP copies again takes as much memory.
        return tensor.to("cpu", copy=True) if storage.nbytes() > 2 * ours[storage.data_ptr()] else tensor

    return [replace(part, tensor=apart(part.tensor)) for part in parts]


def _saved(folder: Path, parts: Sequence[TensorPart], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Arguments of ``dcp.save`` and ``dcp.async_save``."""
    held = [part for part in parts if part.stop > part.start]
    return {
        "state_dict": {part.key: part.tensor for part in held},
        "storage_writer": PartsWriter(folder),
        "planner": PartsSavePlanner(held),
        "process_group": group,
        "no_dist": group is None,
    }


class StoredParts:
    """A DCP folder's tensors, to be read into parts.

    Attributes:
        shapes: names → shapes.

    Raises:
        CheckpointError: see ``load_metadata``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._metadata = folder, load_metadata(folder)
        stored = self._metadata.state_dict_metadata
        self.shapes = {k: tuple(value.size) for k, value in stored.items() if isinstance(value, TensorStorageMetadata)}

    def read(self, parts: Sequence[TensorPart]) -> None:
        """Fill the parts' tensors. No collective: every rank reads what it holds.

        Raises:
            CheckpointError: a tensor that is not there, has another shape, or cannot be read.
        """
        folder, shapes = self._folder, self.shapes
        held = [part for part in parts if part.stop > part.start]
        for part in held:
            if part.key not in shapes:
                raise CheckpointError(f"{folder}: has no tensor {part.key!r}; it is of another model or optimizer")
            if shapes[part.key] != part.shape:
                raise CheckpointError(
                    f"{folder}: {part.key}: expected shape {list(part.shape)}, found {list(shapes[part.key])}"
                )
        if not held:
            return
        try:
            with _unwrapped(), torch.no_grad():
                dcp.load(
                    {part.key: part.tensor for part in held},
                    storage_reader=SafeReader(folder, self._metadata),
                    planner=PartsLoadPlanner(held),
                    no_dist=True,
                )
        except RankFailed as failed:
            if isinstance(failed.error, CheckpointError):
                raise failed.error from failed
            refused = isinstance(failed.error, pickle.UnpicklingError)  # weights_only found what is no tensor
            what = "refused, nothing of it was run" if refused else "cannot be read"
            line = str(failed.error).strip().splitlines()[0]
            raise CheckpointError(f"{folder}: {what}: {type(failed.error).__name__}: {line}") from failed


@contextmanager
def _unwrapped() -> Iterator[None]:
    """DCP's exception (a BaseException that holds those of the ranks) as the first rank's own, named."""
    try:
        with warnings.catch_warnings():
            # "torch.distributed is disabled, … assuming the intent is to … in a single process": it is.
            warnings.filterwarnings(
                "ignore", message="torch.distributed is (disabled|unavailable)", category=UserWarning
            )
            yield
    except dcp.CheckpointException as failed:
        rank, (error, _) = sorted(failed.failures.items())[0]
        raise RankFailed(rank, error) from error


class RankFailed(Exception):
    """What one rank raised within a collective of DCP's.

    Attributes:
        rank: in the group.
        error: what it raised.
    """

    def __init__(self, rank: int, error: BaseException) -> None:
        super().__init__(f"rank {rank}: {type(error).__name__}: {error}")
        self.rank, self.error = rank, error
