"""DeepSpeed's own ZeRO-1/2/3 checkpoints: float32 masters, cut into flat partitions, one file a rank.

Layout, from DeepSpeed 0.18 and 0.19 (``runtime/engine.py``, ``utils/zero_to_fp32.py``). A tag's folder has

- model states: one file (stages 1, 2) or one a rank (3), with ``param_shapes`` (a dict per parameter group: name → shape, in
  the order of the flat buffers), ``shared_params`` (alias → stored name), ``buffer_names``, frozen parameters, and ``module``;
- optimizer states, one a rank. Stages 1, 2: a group's flat buffer, cut into as many equal parts as there are ranks, padding at
  its end. Stage 3: every parameter cut into ranks' parts of ⌈n / ranks⌉ elements, those of one rank one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint.formats.base import Box, Files, LazyTensor, Source, boxed
from digrap_scale.checkpoint.safe_pickle import load_pt
from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import is_inside

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


def detect(path: Path) -> bool:
    folder = tag_folder(path)
    return folder is not None and any(_OPTIMIZER_FILE.fullmatch(file.name) for file in folder.iterdir())


def tag_folder(path: Path, latest: str = "latest") -> Path | None:
    """The folder with a tag's files: ``path`` itself, or the one that its ``latest`` names."""
    if not path.is_dir():
        return None
    if any(_MODEL_FILE.fullmatch(file.name) for file in path.iterdir()):
        return path
    if not (path / latest).is_file():
        return None
    tag = (path / latest).read_text(errors="replace").strip()
    if not is_inside(tag):
        raise CheckpointError(f"{path / latest}: names the tag {tag!r}; expected a folder beside it")
    if not (path / tag).is_dir():
        raise CheckpointError(
            f"{path / latest}: names the tag {tag!r}, which is missing; name another tag's folder instead"
        )
    return path / tag


def read(path: Path) -> Source:
    """Raises: CheckpointError."""
    folder = tag_folder(path)
    assert folder is not None
    ranks = _rank_files(folder, _OPTIMIZER_FILE)
    files = Files()
    model = ModelStates(folder, files)
    states = [_optimizer_state(file) for file in ranks]
    stages = {int(state["zero_stage"]) for state in states}
    count = states[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if stages not in ({1}, {2}, {3}) or count != len(ranks):
        raise CheckpointError(
            f"{folder}: {ranks[0].name} is of {count} ranks at stage {sorted(stages)}, found {len(ranks)} ranks' files; "
            "copy the whole checkpoint, and nothing of another"
        )
    stage = stages.pop()
    if stage == 3 and len(model.files) != len(ranks):
        raise CheckpointError(f"{folder}: expected {len(ranks)} model states, found {len(model.files)}")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [_flat_groups(state.get(key), file, key) for state, file in zip(states, ranks, strict=True)]
    cut = _stage3 if stage == 3 else _stage12
    masters = {
        name: boxed(name, shape, torch.float32, boxes, files, [math.prod(shape)])
        for name, shape, boxes in cut(model, flat, states)
    }
    return Source(path, "zero", model.all_tensors(masters), aliases=model.shared, metadata={"stage": stage})


@dataclass(frozen=True)
class _Flat:
    """A flat float32 buffer of one rank."""

    file: Path
    offset: int
    numel: int

    def box(self, first: int, count: int, start: int) -> Box:
        """``count`` of its elements from ``first`` on, which are a tensor's from ``start`` on."""
        return Box(self.file, self.offset + 4 * first, (start,), (count,))


def _optimizer_state(file: Path) -> dict[str, Any]:
    content = load_pt(file, data=False)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state or "partition_count" not in state:
        raise CheckpointError(f"{file}: expected a ZeRO optimizer's state, found no zero_stage in it")
    return state


def _flat_groups(groups: Any, file: Path, key: str) -> list[_Flat]:
    if not isinstance(groups, list) or not all(isinstance(group, torch.Tensor) for group in groups):
        raise CheckpointError(f"{file}: expected {key}, a list of tensors (elastic checkpoints are not supported)")
    for group in groups:
        if group.dtype != torch.float32:
            raise CheckpointError(f"{file}: {key}: expected float32, found {group.dtype}")
    return [_Flat(file, pt_offset(group, file, key), group.numel()) for group in groups]


def _stage12(
    model: ModelStates, flat: Sequence[list[_Flat]], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, tuple[int, ...], list[Box]]]:
    groups = model.groups
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    _equal(model.folder, "parameter groups", len(groups), *(len(parts) for parts in flat), len(paddings))
    for group, shapes in enumerate(groups):
        parts = [rank[group] for rank in flat]
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.numel)
        _equal(model.folder, f"parameters of group {group}", len(shapes), len(paddings[group]))
        start = 0
        for (name, shape), padding in zip(shapes.items(), paddings[group], strict=True):
            yield name, shape, list(_overlap(parts, bounds, start, math.prod(shape), 0))
            start += math.prod(shape) + padding
        # As zero_to_fp32: what is left over is alignment, to twice the number of ranks.
        align = 2 * len(parts)
        _equal(model.folder, f"elements of group {group}", -(-start // align), -(-bounds[-1] // align))


def _stage3(
    model: ModelStates, flat: Sequence[list[_Flat]], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, tuple[int, ...], list[Box]]]:
    shapes = {name: shape for group in model.groups for name, shape in group.items()}
    ranks = len(flat)
    bounds = []
    for parts in flat:
        bounds.append([0])
        for part in parts:
            bounds[-1].append(bounds[-1][-1] + part.numel)
    start = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        width = -(-numel // ranks)
        yield (
            name,
            shape,
            [
                box
                for rank, parts in enumerate(flat)
                for box in _overlap(parts, bounds[rank], start, max(0, min(width, numel - rank * width)), rank * width)
            ],
        )
        start += width
    _equal(model.folder, "elements of a rank", start, *(bound[-1] for bound in bounds))


def _overlap(parts: Sequence[_Flat], bounds: Sequence[int], start: int, count: int, place: int) -> Iterator[Box]:
    """Elements [start, start + count) of buffers that follow each other; they are a tensor's from ``place`` on."""
    for part, first, last in zip(parts, bounds[:-1], bounds[1:], strict=True):
        low, high = max(start, first), min(start + count, last)
        if low < high:
            yield part.box(low - first, high - low, place + low - start)


def _equal(folder: Path, what: str, expected: int, *found: int) -> None:
    if any(number != expected for number in found):
        raise CheckpointError(
            f"{folder}: {what}: expected {expected} by param_shapes, found {sorted(set(found))}; "
            "its files are not of one save"
        )


def pt_offset(tensor: torch.Tensor, file: Path, name: str) -> int:
    """The byte of a ``.pt`` file where the data of a tensor loaded by ``load_pt(data=False)`` begin."""
    if not tensor.is_contiguous():
        raise CheckpointError(f"{file}: {name}: stored with strides {tensor.stride()}; expected a contiguous tensor")
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None  # set by a load without data
    return start + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _rank_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """A file for every rank, in order, and no other."""
    found: dict[int, Path] = {}
    for file in folder.iterdir():
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        if int(match.group(2)) > 0:
            raise CheckpointError(
                f"{file}: a part of a model that is split by tensor or pipeline parallelism; expected data parallelism alone"
            )
        rank = int(match.group(1) or 0)
        if rank in found:
            raise CheckpointError(
                f"{folder}: {found[rank].name} and {file.name} are both of rank {rank}; remove the stale one"
            )
        found[rank] = file
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{folder}: the file of rank {missing[0]} is missing; copy the whole checkpoint")
    return [found[rank] for rank in sorted(found)]


class ModelStates:
    """What model states tell: names and shapes, aliases, buffers, frozen parameters.

    Raises:
        CheckpointError: missing or damaged files.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self.files = _rank_files(folder, _MODEL_FILE)
        contents = [load_pt(file, data=False) for file in self.files]
        first = contents[0]
        wanted = ("module", "param_shapes", "buffer_names", "shared_params")
        for file, content in zip(self.files, contents, strict=True):
            lacks = [key for key in wanted if not isinstance(content, dict) or key not in content]
            if lacks:
                raise CheckpointError(f"{file}: expected a DeepSpeed engine's model states, found no {lacks[0]!r}")
        if first.get("num_experts"):
            raise CheckpointError(f"{folder}: a mixture of experts (expert-parallel files) is not supported")
        self.groups: list[dict[str, tuple[int, ...]]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in first["param_shapes"]
        ]
        self.shared: dict[str, str] = dict(first["shared_params"])
        self._order = list(first["module"])
        self._rest: dict[str, LazyTensor] = {}
        frozen = first.get("frozen_param_shapes") or {}
        for name, shape in frozen.items():
            self._rest[name] = self._frozen(name, tuple(shape), contents, files)
        masters = {name for group in self.groups for name in group}
        partitioned = self.files[0].name.startswith("zero_pp_rank_")  # stage 3
        for name, tensor in first["module"].items():
            # Stage 3 has an empty stand-in for each parameter; buffers are whole.
            stands_in = partitioned and name not in first["buffer_names"]
            known = name in masters or name in self.shared or name in frozen
            if isinstance(tensor, torch.Tensor) and not stands_in and not known:
                self._rest[name] = pt_tensor(name, tensor, self.files[0], files)

    def _frozen(self, name: str, shape: tuple[int, ...], contents: list[Any], files: Files) -> LazyTensor:
        parts = [content["frozen_param_fragments"][name] for content in contents]
        numel = math.prod(shape)
        boxes, start = [], 0
        for part, file in zip(parts, self.files, strict=True):
            count = min(part.numel(), numel - start)
            boxes.append(Box(file, pt_offset(part, file, name), (start,), (count,)))
            start += count
        return boxed(name, shape, parts[0].dtype, boxes, files, [numel])

    def all_tensors(self, masters: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Masters and the rest, in the module's order."""
        tensors = {**self._rest, **masters}
        order = [name for name in self._order if name in tensors]
        return {name: tensors[name] for name in dict.fromkeys([*order, *tensors])}


def pt_tensor(
    name: str, tensor: torch.Tensor, file: Path, files: Files, shape: Sequence[int] | None = None
) -> LazyTensor:
    """A whole tensor of a ``.pt`` file (flat ones may be given their shape). Raises: CheckpointError."""
    shape = tuple(tensor.shape if shape is None else shape)
    box = Box(file, pt_offset(tensor, file, name), (0,), (tensor.numel(),))
    return boxed(name, shape, tensor.dtype, [box], files, [math.prod(shape)])
