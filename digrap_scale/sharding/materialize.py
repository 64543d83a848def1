"""Parameters on the meta device get their memory and their values: whole, or only the slice that this rank holds.

Values come by ``Slices``, named as in the unwrapped model. They are copied piece by piece, so that nothing but the
destination grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from digrap_scale.types import Slices

PIECE_BYTES = 2**24


def fill_(destination: torch.Tensor, slices: Slices, name: str, start: int = 0) -> None:
    """Elements of ``name`` from ``start`` on into a contiguous tensor, cast to its dtype."""
    flat = destination.detach().view(-1)
    step = PIECE_BYTES // flat.element_size()
    for first in range(0, flat.numel(), step):
        piece = flat[first : first + step]
        piece.copy_(slices(name, start + first, start + first + piece.numel()))


def read_whole(slices: Slices, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor ``name``, in memory of its own."""
    full = torch.empty(shape, dtype=dtype, device=device)
    fill_(full, slices, name)
    return full


Places = dict[int, list[tuple[nn.Module, str]]]


def places(model: nn.Module) -> Places:
    """id of a parameter → the modules and attributes that hold it (several if it is tied)."""
    found: Places = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((module, key))
    return found


def put(where: Places, parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """A new parameter of ``value`` wherever ``parameter`` is; a tensor cannot change its device from meta in place."""
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module, key in where[id(parameter)]:
        setattr(module, key, new)
    return new


def materialize(model: nn.Module, slices: Slices | None, device: torch.device, only_scalars: bool = False) -> None:
    """Whole parameters on ``device`` in place of those (or of the 0-d ones) that are on the meta device."""
    where = places(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not (only_scalars and parameter.ndim):
            assert slices is not None, f"{name}: on the meta device, and nothing to read it from"
            put(where, parameter, read_whole(slices, name, parameter.shape, parameter.dtype, device))


class OneAtATime(nn.Module):
    """Stands for a module whose parameters get memory only while they are iterated over, one after the other.

    ``deepspeed.zero.Init(module=…)`` partitions every parameter before it asks for the next, so that one whole
    parameter is there at a time. It sends rank 0's values to all: the others need not read.

    Args:
        model: whose parameters, some on the meta device, are to be iterated over.
        slices: reads those.
        dtype: what floating parameters are cast to; None leaves them.
        device: where they go.
        read: whether this rank's values count.
    """

    def __init__(
        self, model: nn.Module, slices: Slices | None, dtype: torch.dtype | None, device: torch.device, read: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._slices, self._dtype, self._device, self._read = slices, dtype, device, read

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        where = places(self.model)
        for name, parameter in list(self.model.named_parameters()):
            dtype = self._dtype if self._dtype is not None and parameter.is_floating_point() else parameter.dtype
            # 0-d tensors cannot be viewed as the bytes that are sent.
            shape = parameter.shape or torch.Size((1,))
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self._device, dtype).view(shape)
            else:
                assert self._slices is not None, f"{name}: on the meta device, and nothing to read it from"
                value = torch.empty(shape, dtype=dtype, device=self._device)
                if self._read:
                    fill_(value, self._slices, name)
                parameter = put(where, parameter, value)
                del value
            yield parameter


def local_numel_before(rows: int, numel: int, ranks: int, rank: int) -> int:
    """Elements ahead of rank's shard, by torch.chunk's rule: runs of ceil(rows / ranks) rows, the last short or empty."""
    return min(rank * math.ceil(rows / ranks), rows) * (numel // rows if rows else 0)
