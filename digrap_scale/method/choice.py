"""Which kernels a rank walks its shards with."""

from __future__ import annotations

import warnings

import torch

from digrap_scale.method.kernels import CompiledKernels, Kernels
from digrap_scale.method.native import NativeError, NativeKernels

COMPILE_ELEMENTS = 1 << 25  # ``auto``: below this, a rank's step is too short to pay for torch.compile


def choose_kernels(choice: str, elements: int, device: torch.device) -> Kernels:
    """The kernels for a rank that holds ``elements`` trained elements on ``device``.

    Args:
        choice: ``eager``, ``compile``, ``native``, or ``auto``: native for shards on the CPU (eager, with a warning, where
            they cannot be built), on accelerators compiled from ``COMPILE_ELEMENTS`` on.

    Raises:
        ValueError: another word; ``native`` for shards on an accelerator, or where it cannot be built.
    """
    if choice not in ("auto", "eager", "compile", "native"):
        raise ValueError(f"kernels must be auto, eager, compile or native, found {choice!r}")
    if choice == "native" and device.type != "cpu":
        raise ValueError(f"kernels: native works on the CPU, the shards are on {device.type}; use compile or auto")
    if choice == "native" or (choice == "auto" and device.type == "cpu"):
        try:
            return NativeKernels()
        except NativeError as error:
            if choice == "native":
                raise ValueError(f"kernels: native: {error}; use eager") from error
            warnings.warn(f"digrap-scale: eager kernels take the place of native ones: {error}", stacklevel=2)
            return Kernels()
    if choice == "compile" or (choice == "auto" and elements >= COMPILE_ELEMENTS):
        return CompiledKernels()
    return Kernels()
