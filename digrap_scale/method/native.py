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
_NO_MOMENTS = (1.0, 0.0, 0.0, 0.0)


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
        moments = [view.moments if with_previous and view.projected else None for view in views]
        previous = [
            view.previous if with_previous and view.projected and before is None else None
            for view, before in zip(views, moments, strict=True)
        ]
        table = _Table([view.weight.numel() for view in views])
        table.add([view.grad for view in views])
        table.add([view.weight if view.projected else None for view in views])
        table.add([view.reference if view.projected else None for view in views])
        table.add(previous)
        table.add([None if before is None else before.first for before in moments])
        table.add([None if before is None else before.second for before in moments])
        numbers = [_NO_MOMENTS if before is None else before.factors for before in moments]
        return self._sums(self._library.gradient_products, table, numbers, 4)

    def update_statistics(self, views: Sequence[ShardView]) -> torch.Tensor:
        """⟨u, d_t⟩ and ‖u‖² of every view, [L, 2] float64; zeros where it is not projected."""
        for view in views:
            assert view.previous is not None or not view.projected, f"{view.spec.name}: its weights were not kept"
        table = _Table([view.weight.numel() if view.projected else 0 for view in views])
        table.add([view.weight for view in views])
        table.add([view.previous for view in views])
        table.add([view.reference for view in views])
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
        table = _Table([target.numel() for target in targets])
        table.add(targets, changed=True)
        table.add(thetas)
        table.add(references)
        self._run(self._library.add_displacement, table, [(factor, scale) for factor in factors], None)

    def adam_all_(self, stepped: Sequence[tuple[ShardView, AdamState, AdamNumbers]]) -> None:
        """One step of Adam on every view, with the gradient scale · g + factor · (θ − θ₀); see ``AdamNumbers``."""
        views = [view for view, _, _ in stepped]
        table = _Table([view.weight.numel() for view in views])
        table.add([view.weight for view in views], changed=True)
        table.add([state.first for _, state, _ in stepped], changed=True)
        table.add([state.second for _, state, _ in stepped], changed=True)
        table.add([view.grad for view in views])
        table.add([view.reference if numbers.factor != 0.0 else None for view, _, numbers in stepped])
        self._run(self._library.adam, table, [numbers for _, _, numbers in stepped], None)

    def _sums(
        self, function: Callable[..., None], table: _Table, numbers: Sequence[Sequence[float]], width: int
    ) -> torch.Tensor:
        blocks = table.blocks()
        sums = np.zeros((len(blocks), width))
        self._run(function, table, numbers, sums, blocks)
        total = torch.zeros(len(table.sizes), width, dtype=torch.float64)
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
        rows = table.rows()
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
    """Addresses and kinds of the operands of many layers, a column an operand; keeps alive what had to be copied for them.

    Args:
        sizes: elements of each layer.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self._columns: list[np.ndarray] = []
        self._alive: list[torch.Tensor] = []

    def add(self, operands: Sequence[torch.Tensor | None], changed: bool = False) -> None:
        """The next operand of every layer; ``changed`` if it is written to."""
        addresses, kinds = [0] * len(operands), [0] * len(operands)
        for row, tensor in enumerate(operands):  # for each of thousands of layers in each step: no calls but torch's
            if tensor is None:
                continue
            kind = KINDS.get(tensor.dtype, 0)
            if not kind or not tensor.is_contiguous():
                assert not changed, f"a {tensor.dtype} tensor of strides {tensor.stride()} cannot be changed in place"
                tensor, kind = tensor.to(torch.float32).contiguous(), 1
                self._alive.append(tensor)
            addresses[row], kinds[row] = tensor.data_ptr(), kind
        self._columns += [np.array(addresses, dtype=np.int64), np.array(kinds, dtype=np.int64)]

    def rows(self) -> np.ndarray:
        """[layers, 2 · operands] int64."""
        return np.stack(self._columns, axis=1)

    def blocks(self) -> np.ndarray:
        """[blocks, 3] int64: row, start, stop."""
        counts = -(-self.sizes // BLOCK_ELEMENTS)
        rows = np.repeat(np.arange(len(counts)), counts)
        starts = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK_ELEMENTS
        stops = np.minimum(starts + BLOCK_ELEMENTS, self.sizes[rows])
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
