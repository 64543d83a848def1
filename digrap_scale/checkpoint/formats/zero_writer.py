"""Weights as a DeepSpeed ZeRO-3 checkpoint for N ranks (its layout: ``formats/zero.py``).

It has weights and no optimizer state, so it is loaded by name, into an engine of any grouping and precision:

    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)

DeepSpeed's default call restores flat buffers by position, together with the optimizer's state; it fails here with the names of
all weights as missing keys, instead of filling an engine whose parameters are in another order.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint.atomic import save_error
from digrap_scale.checkpoint.formats.base import LazyTensor, OpenFiles, Source, WriteOptions, bytes_of
from digrap_scale.checkpoint.formats.huggingface import copy_companions
from digrap_scale.checkpoint.formats.skeleton import empty, save_skeleton
from digrap_scale.checkpoint.formats.zero import pt_offset

TAG = "global_step0"
SUB_GROUP_ELEMENTS = 10**9  # of one rank, as DeepSpeed's sub_group_size is by default
_VERSION = "0.19.8"  # of the layout


@dataclass(frozen=True)
class _Place:
    """Where a rank keeps its part of a tensor: which flat buffer, from which element on."""

    group: int
    start: int
    width: int


def write(source: Source, folder: Path, options: WriteOptions) -> None:
    """Floating-point tensors (float32) become parameters, all others buffers. Raises: SaveError."""
    copy_companions(source.companions, folder, source.left_out)
    ranks = options.world_size
    assert ranks is not None
    (folder / "latest").write_text(TAG)
    folder = folder / TAG
    folder.mkdir()
    # DeepSpeed keeps empty tensors out of its flat buffers, too.
    masters = {name: t for name, t in source.tensors.items() if t.dtype.is_floating_point and t.numel}
    buffers = {name: t for name, t in source.tensors.items() if name not in masters}
    places, sizes = _plan(masters, ranks)
    model_offsets, master_offsets = [], []
    for rank in range(ranks):
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        model = save_skeleton(_model_state(source, masters, buffers, ranks), file)
        model_offsets.append({name: (file, pt_offset(model["module"][name], file, name)) for name in buffers})
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        optimizer = save_skeleton(_optimizer_state(sizes, ranks), file)
        groups = optimizer["optimizer_state_dict"]["fp32_flat_groups"]
        master_offsets.append([(file, pt_offset(group, file, "fp32_flat_groups")) for group in groups])
    with _Filler() as fill:
        for name, tensor in buffers.items():
            data = tensor.read(0, tensor.numel)
            for offsets in model_offsets:
                fill(*offsets[name], data)
            options.advance(data.nbytes)
        for name, tensor in masters.items():
            place, start = places[name], 0
            for piece in tensor.pieces():
                for rank, first, part in _by_rank(piece, start, place.width):
                    file, offset = master_offsets[rank][place.group]
                    fill(file, offset + 4 * (place.start + first), part)
                start += piece.numel()
                options.advance(piece.nbytes)


def _plan(masters: dict[str, LazyTensor], ranks: int) -> tuple[dict[str, _Place], list[int]]:
    """Places, equal on every rank, and the buffers' sizes."""
    places: dict[str, _Place] = {}
    sizes = [0]
    for name, tensor in masters.items():
        if sizes[-1] >= SUB_GROUP_ELEMENTS:
            sizes.append(0)
        width = -(-tensor.numel // ranks)
        places[name] = _Place(len(sizes) - 1, sizes[-1], width)
        sizes[-1] += width
    return places, sizes


def _by_rank(piece: torch.Tensor, start: int, width: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """A piece of a flattened tensor, from its element ``start`` on → (rank, first element in its part, values)."""
    done = 0
    while done < piece.numel():
        rank, first = divmod(start + done, width)
        count = min(width - first, piece.numel() - done)
        yield rank, first, piece[done : done + count]
        done += count


def _model_state(
    source: Source, masters: dict[str, LazyTensor], buffers: dict[str, LazyTensor], ranks: int
) -> dict[str, Any]:
    return {
        "module": OrderedDict((name, empty(tensor.shape, tensor.dtype)) for name, tensor in buffers.items()),
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, torch.Size(tensor.shape)) for name, tensor in masters.items())],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {alias: name for alias, name in source.aliases.items() if name in source.tensors},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": 0,
        "global_samples": 0,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
    }


def _optimizer_state(sizes: list[int], ranks: int) -> dict[str, Any]:
    state = {
        "zero_stage": 3,
        "loss_scaler": None,
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "fp32_flat_groups": [empty((size,), torch.float32) for size in sizes],
    }
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": _VERSION}


class _Filler:
    """Writes at places of files that exist."""

    def __init__(self) -> None:
        self._open = OpenFiles(os.O_WRONLY)

    def __enter__(self) -> _Filler:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, file: Path, offset: int, values: torch.Tensor) -> None:
        try:
            descriptor, view, done = self._open.descriptor(file), bytes_of(values), 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            raise save_error(file, error) from error
