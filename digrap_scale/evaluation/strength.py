"""ω per layer over time, as a run keeps it in ``strength/strength.jsonl``. Shapes: T snapshots, L layers.

A line is ``{"names": [...]}`` (the layers of the rows below it) or ``{"step": 20, "values": [...]}``. Lines are only
ever appended: a crash costs at most the last one, which the reader leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digrap_scale.errors import ConfigError

STRENGTH_FILE = "strength/strength.jsonl"


@dataclass(frozen=True)
class StrengthHistory:
    """ω over a run.

    Attributes:
        steps: [T] optimizer steps done at each snapshot, rising.
        names: [L] layer names, in the model's order.
        values: [T, L] float32 ω; NaN where a layer was not there at that step.
    """

    steps: list[int]
    names: list[str]
    values: torch.Tensor


def encode_names(names: Sequence[str]) -> str:
    """The line that names the layers of the rows below it."""
    return json.dumps({"names": list(names)}, ensure_ascii=False) + "\n"


def encode_row(step: int, values: Sequence[float]) -> str:
    """The line of one snapshot; six digits are finer than ω's own noise. A non-finite ω becomes null."""
    return (
        json.dumps({"step": step, "values": [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]}) + "\n"
    )


def read_strength(folder: str | Path) -> StrengthHistory:
    """A run's ω per layer. A run without ω (plain fine-tuning) gives zero snapshots of zero layers.

    Args:
        folder: the run's folder.

    Raises:
        ConfigError: there is no such folder, or a line other than a torn last one is not readable.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a run's folder; give the folder that holds metrics.jsonl and strength/")
    path = Path(folder) / STRENGTH_FILE
    rows: dict[int, tuple[list[str], torch.Tensor]] = {}
    layers: dict[str, None] = {}
    names: list[str] = []
    for number, line in read_lines(path):
        if "names" in line:
            names = [str(name) for name in line["names"]]
            layers.update(dict.fromkeys(names))
            continue
        values = line.get("values")
        if not isinstance(values, list) or len(values) != len(names):
            raise ConfigError(
                f"{path}, line {number}: expected {len(names)} values; the file is damaged, remove it and train again"
            )
        # a step may come twice where a run was resumed by hand: the later row is the one that happened
        rows[int(line["step"])] = (
            names,
            torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32),
        )
    steps, column = sorted(rows), {name: i for i, name in enumerate(layers)}
    table_TL = torch.full((len(steps), len(layers)), math.nan)
    for row_L, step in zip(table_TL, steps, strict=True):
        row_L[[column[name] for name in rows[step][0]]] = rows[step][1]
    return StrengthHistory(steps, list(layers), table_TL)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file; nothing of a missing one. A torn last line is left out.

    Raises:
        ConfigError: a whole line is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
            if not isinstance(line, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, found {type(line).__name__}")
            yield number, line
