"""How far two checkpoints are apart: per tensor and per layer ‖A − B‖, the largest difference, and the angle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.checkpoint.convert import module_names
from digrap_scale.checkpoint.formats import open_source
from digrap_scale.checkpoint.formats.base import LazyTensor, Source
from digrap_scale.checkpoint.formats.ours import refuse_incomplete
from digrap_scale.checkpoint.progress import progress_bar
from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import differing_names

_PIECE_ELEMENTS = 1 << 22


@dataclass
class Drift:
    """Sums over elements, in float64; adding two gives those of both.

    Attributes:
        elements: number of elements.
        squares_a: Σ a².
        squares_b: Σ b².
        products: Σ a·b.
        squares: Σ (a − b)².
        largest: max |a − b|.
    """

    elements: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, other: Drift) -> None:
        for key, value in asdict(other).items():
            own = getattr(self, key)
            # max() would keep or drop a NaN by the order of the two
            larger = math.nan if math.isnan(own) or math.isnan(value) else max(own, value)
            setattr(self, key, larger if key == "largest" else own + value)

    @property
    def norm(self) -> float:
        """‖A − B‖."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float:
        """‖A − B‖ / ‖A‖; infinite where only A is 0."""
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.squares_a) if self.squares_a else math.inf

    @property
    def cosine(self) -> float:
        """⟨A, B⟩ / (‖A‖·‖B‖); 1 for equal tensors, not a number where just one of them is 0."""
        if self.squares == 0:
            return 1.0
        sizes = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return self.products / sizes if sizes else math.nan

    def facts(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity."""
        values = {
            "norm": self.norm,
            "relative": self.relative,
            "max": self.largest,
            "cosine": self.cosine,
            "elements": self.elements,
        }
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


def diff(
    a: str | Path,
    b: str | Path,
    *,
    by_layer: bool = False,
    advance: Callable[[int], None] = lambda count: None,
    show_progress: bool = False,
) -> dict[str, Drift]:
    """Name → drift from ``a`` to ``b``, in ``a``'s order; two bounded pieces are in memory at a time.

    Args:
        a: a checkpoint of any known format, such as the pre-trained weights.
        b: another one with the same tensors; names are compared as in the files, else as in the model of ``config.json``.
        by_layer: sum over a layer's tensors: a name up to its first number ("model.layers.3"), or up to its last dot.
        advance: called with the number of elements that were compared.
        show_progress: a bar on the terminal.

    Raises:
        CheckpointError: a checkpoint cannot be read, or names or shapes differ.
    """
    first, second = open_source(a), open_source(b)
    for source in (first, second):
        refuse_incomplete(source)
    if first.tensors.keys() != second.tensors.keys():
        # Transformers' files and a training checkpoint may name one model's tensors differently.
        first, second = module_names(first), module_names(second)
    _check_same(first, second)
    found: dict[str, Drift] = {}
    with progress_bar("compare", first.nbytes, show_progress) as shown:
        for name, tensor in first.tensors.items():
            drift = _drift(tensor, second.tensors[name], advance)
            shown(tensor.nbytes)
            found.setdefault(layer_of(name) if by_layer else name, Drift()).add(drift)
    return found


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number, or without its last part."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name.rpartition(".")[0] or name


def _drift(a: LazyTensor, b: LazyTensor, advance: Callable[[int], None]) -> Drift:
    drift = Drift()
    for start in range(0, a.numel, _PIECE_ELEMENTS):
        stop = min(start + _PIECE_ELEMENTS, a.numel)
        x, y = (tensor.read(start, stop).to(torch.float64) for tensor in (a, b))
        gap = x - y
        drift.add(
            Drift(
                stop - start,
                float(x.dot(x)),
                float(y.dot(y)),
                float(x.dot(y)),
                float(gap.dot(gap)),
                float(gap.abs_().max()),
            )
        )
        advance(stop - start)
    return drift


def _check_same(a: Source, b: Source) -> None:
    if a.tensors.keys() != b.tensors.keys():
        names = differing_names(set(a.tensors), set(b.tensors), f"only in {a.path}", f"only in {b.path}")
        raise CheckpointError(f"cannot compare {a.path} and {b.path}: {names}")
    for name, tensor in a.tensors.items():
        if tensor.shape != b.tensors[name].shape:
            raise CheckpointError(
                f"cannot compare {a.path} and {b.path}: {name}: shape {list(tensor.shape)} and "
                f"{list(b.tensors[name].shape)}"
            )


def total(drifts: Mapping[str, Drift]) -> Drift:
    """Of all tensors together."""
    whole = Drift()
    for drift in drifts.values():
        whole.add(drift)
    return whole


def write_json(path: Path, drifts: Mapping[str, Drift]) -> None:
    """Raises: SaveError."""
    content = {"total": total(drifts).facts(), "parts": {name: drift.facts() for name, drift in drifts.items()}}
    write_file(path, json.dumps(content, indent=2) + "\n")
