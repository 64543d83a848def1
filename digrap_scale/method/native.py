"""Native kernels for shards on the CPU: each pass of a step is one call for all layers, large and small.

``native.cpp`` is compiled once by the machine's own compiler, and kept in the user's cache. Shapes: L layers, K statistics,
N local elements.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from digrap_scale.method.kernels import AdamNumbers, Kernels
from digrap_scale.types import AdamState, ShardView

SOURCE = Path(__file__).with_name("native.cpp")
BLOCK_ELEMENTS = 1 << 16  # what one thread takes at a time
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# By what torch found the processor capable of, not -march=native: a cache on a shared disk serves unlike hosts.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ABSENT = (0, 0)


class NativeError(Exception):
    """The kernels cannot be had on this machine; the message says why."""


class NativeKernels(Kernels):
    """Every operand is read once, all layers in one call; for tensors on the CPU.

    Raises:
        NativeError: there is no compiler, or it fails.
    """

    name = "native"

    def __init__(self) -> None:
        super().__init__()
        self._library = load_library()

    def gradient_statistics(self, views: Sequence[ShardView], with_previous: bool) -> torch.Tensor:
        """⟨g, d_t⟩, ‖d_t‖², ⟨g, d_{t-1}⟩ and ‖g‖² of every view, [L, 4] float64, without ``grad_scale``."""
        table, numbers = _Table(), []
        for view in views:
            moments = view.moments if with_previous and view.projected else None
            previous = view.previous if with_previous and view.projected and moments is None else None
            table.row(
                view.weight.numel(),
                view.grad,
                view.weight if view.projected else None,
                view.reference if view.projected else None,
                previous,
                None if moments is None else moments.first,
                None if moments is None else moments.second,
            )
            numbers.append((1.0, 0.0, 0.0, 0.0) if moments is None else moments.factors)
        return self._sums(self._library.gradient_products, table, numbers, 4)

    def update_statistics(self, views: Sequence[ShardView]) -> torch.Tensor:
        """⟨u, d_t⟩ and ‖u‖² of every view, [L, 2] float64; zeros where it is not projected."""
        table = _Table()
        for view in views:
            assert view.previous is not None or not view.projected, f"{view.spec.name}: its weights were not kept"
            elements = view.weight.numel() if view.projected else 0
            table.row(elements, view.weight, view.previous, view.reference)
        return self._sums(self._library.update_products, table, [(0.0,)] * len(views), 2)

    def add_displacements_(
        self,
        targets: Sequence[torch.Tensor],
        thetas: Sequence[torch.Tensor],
        references: Sequence[torch.Tensor | None],
        factors: Sequence[float],
        scale: float,
    ) -> None:
        """Each target ← scale · target + factor · (θ − θ₀), summed in float32 and rounded once."""
        table = _Table()
        for target, theta, reference in zip(targets, thetas, references, strict=True):
            table.row(target.numel(), target, theta, reference, changed=1)
        self._run(self._library.add_displacement, table, [(factor, scale) for factor in factors], None)

    def adam_all_(self, stepped: Sequence[tuple[ShardView, AdamState, AdamNumbers]]) -> None:
        """One step of Adam on every view, with the gradient scale · g + factor · (θ − θ₀); see ``AdamNumbers``."""
        table = _Table()
        for view, state, numbers in stepped:
            reference = view.reference if numbers.factor != 0.0 else None
            table.row(view.weight.numel(), view.weight, state.first, state.second, view.grad, reference, changed=3)
        self._run(self._library.adam, table, [numbers for _, _, numbers in stepped], None)

    def _sums(
        self, function: Callable[..., None], table: _Table, numbers: Sequence[Sequence[float]], width: int
    ) -> torch.Tensor:
        blocks = table.blocks()
        sums = np.zeros((len(blocks), width))
        self._run(function, table, numbers, sums, blocks)
        total = torch.zeros(len(table.rows), width, dtype=torch.float64)
        return total.index_add_(0, torch.from_numpy(blocks[:, 0].copy()), torch.from_numpy(sums))

    def _run(
        self,
        function: Callable[..., None],
        table: _Table,
        numbers: Sequence[Sequence[float]],
        sums: np.ndarray | None,
        blocks: np.ndarray | None = None,
    ) -> None:
        """``function`` on all blocks, a few at a time on each of torch's number of threads (ctypes lets go of the GIL)."""
        blocks = table.blocks() if blocks is None else blocks
        if not len(blocks):
            return
        rows = np.array(table.rows, dtype=np.int64)
        values = np.array(numbers, dtype=np.float32)
        out = None if sums is None else sums.ctypes.data
        threads = torch.get_num_threads()
        portions = min(len(blocks), 1 if threads == 1 else 4 * threads)
        bounds = [len(blocks) * i // portions for i in range(portions + 1)]

        def call(i: int) -> None:
            function(rows.ctypes.data, values.ctypes.data, blocks.ctypes.data, bounds[i], bounds[i + 1], out)

        if portions == 1:
            call(0)
        else:
            list(_threads(threads, os.getpid()).map(call, range(portions)))


class _Table:
    """Addresses and kinds of the operands of many layers; keeps alive what had to be copied for them."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self._sizes: list[int] = []
        self._alive: list[torch.Tensor] = []

    def row(self, elements: int, *operands: torch.Tensor | None, changed: int = 0) -> None:
        """Adds a layer; its first ``changed`` operands are written to."""
        row: list[int] = []
        for number, tensor in enumerate(operands):
            row += _ABSENT if tensor is None else self._operand(tensor, number < changed)
        self.rows.append(row)
        self._sizes.append(elements)

    def _operand(self, tensor: torch.Tensor, changed: bool) -> tuple[int, int]:
        kind = KINDS.get(tensor.dtype, 0)
        if not kind or not tensor.is_contiguous():
            assert not changed, f"a {tensor.dtype} tensor of strides {tensor.stride()} cannot be changed in place"
            tensor = tensor.to(torch.float32).contiguous()
            kind = 1
            self._alive.append(tensor)
        return tensor.data_ptr(), kind

    def blocks(self) -> np.ndarray:
        """[blocks, 3] int64: row, start, stop."""
        sizes = np.array(self._sizes, dtype=np.int64)
        counts = -(-sizes // BLOCK_ELEMENTS)
        rows = np.repeat(np.arange(len(sizes)), counts)
        starts = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK_ELEMENTS
        stops = np.minimum(starts + BLOCK_ELEMENTS, sizes[rows])
        return np.ascontiguousarray(np.stack([rows, starts, stops], axis=1), dtype=np.int64)


@functools.lru_cache(maxsize=2)
def _threads(count: int, _process: int) -> ThreadPoolExecutor:
    """Threads that stay; others in a forked process, which inherits none."""
    return ThreadPoolExecutor(count, thread_name_prefix="digrap_scale_kernels")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels, from the cache, or compiled now (a second or two).

    Raises:
        NativeError: there is no compiler (``CXX``, g++ or clang++), or it fails.
    """
    command = [*_compiler(), *_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        version = subprocess.run([*_compiler(), "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode() + version).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "digrap_scale"
        built = cache / f"kernels-{key}.so"
        if not built.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            # Processes may build at the same time: each its own file, renamed when it is whole. No lock can be left behind.
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                partial = Path(folder) / built.name
                subprocess.run([*command, str(SOURCE), "-o", str(partial)], capture_output=True, text=True, check=True)
                partial.rename(built)
        library = ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        text = error.stderr if isinstance(error.stderr, str) else ""
        line = next((line for line in text.splitlines() if "error" in line), text.strip()[:200])
        raise NativeError(f"{shlex.join(error.cmd[:1])} failed on {SOURCE.name}: {line}") from error
    except OSError as error:
        raise NativeError(f"the native kernels cannot be built or loaded: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name in ("gradient_products", "update_products", "add_displacement", "adam"):
        function = getattr(library, name)
        function.argtypes = (pointer, pointer, pointer, integer, integer, pointer)
        function.restype = None
    return library


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NativeError("no C++ compiler: neither CXX nor g++ nor clang++ is there")
