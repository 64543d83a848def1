"""``diff``'s table and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from digrap_scale.checkpoint.atomic import atomic_file
from digrap_scale.checkpoint.diff import Drift, total
from digrap_scale.errors import ConfigError

_PICTURES = (".png", ".pdf", ".svg")


def show_table(drifts: Mapping[str, Drift], console: Console, rows: int | None = None) -> None:
    """Prints the drifts, or the ``rows`` largest by ‖A − B‖ / ‖A‖, and their total."""
    table = Table("", "‖A − B‖", "‖A − B‖ / ‖A‖", "max |a − b|", "cosine", "elements")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    shown = list(drifts.items())
    if rows is not None and rows < len(shown):
        # What is no number is most worth a look.
        shown.sort(key=lambda item: (math.isnan(item[1].relative), item[1].relative), reverse=True)
        shown = shown[:rows]
        table.title = f"{rows} of {len(drifts)}, largest relative drift first"
    for name, drift in [*shown, ("total", total(drifts))]:
        if name == "total":
            table.add_section()
        numbers = (drift.norm, drift.relative, drift.largest)
        table.add_row(name, *(f"{value:.4g}" for value in numbers), f"{drift.cosine:.6f}", f"{drift.elements:,}")
    console.print(table)


def draw(path: Path, drifts: Mapping[str, Drift], title: str) -> None:
    """Relative drift as bars, in the checkpoint's order.

    Raises:
        ConfigError: a file name that says no picture format.
        SaveError: the file cannot be written.
    """
    if path.suffix not in _PICTURES:
        raise ConfigError(f"--picture {path}: expected a name that ends in {', '.join(_PICTURES)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(2.0, 0.22 * len(drifts) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = [drift.relative if math.isfinite(drift.relative) else 0.0 for drift in drifts.values()]
    notes = {True: " (not a number)", False: " (A is 0)"}
    names = [
        name if math.isfinite(drift.relative) else name + notes[math.isnan(drift.relative)]
        for name, drift in drifts.items()
    ]
    axes.barh(range(len(drifts)), lengths)
    axes.set_yticks(range(len(drifts)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("‖A − B‖ / ‖A‖")
    axes.set_title(title)
    with atomic_file(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."))
