"""The pictures of a report, as PNG bytes. Drawn without pyplot: no window, no global state."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from digrap_scale.evaluation.strength import StrengthHistory

# Okabe and Ito's palette, then the four of Tol's "muted" that are far from it: told apart with every common kind of colour
# blindness. Grey first, for the starting point.
COLOURS = (
    "#8c8c8c", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#F0E442",
    "#332288", "#882255", "#999933", "#44AA99",
)  # fmt: skip
MARKERS = "oDsv^P*X<>p"  # a number that shares no factor with that of the colours: pairs repeat late
SHIFT_MARKERS = {"id": "o", "near": "s", "far": "^"}
INK = "#222222"
_MAX_TICKS = 24
_LETTER_INCHES = 0.078  # of a 9 pt letter


class BarColumn(Protocol):
    """What the bars need of a table's column."""

    @property
    def title(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def cells(self) -> list[tuple[float, float]]: ...
    @property
    def is_mean(self) -> bool: ...


def bars(names: Sequence[str], columns: Sequence[BarColumn]) -> bytes:
    """Methods × test sets with ± one standard error; means stand apart on the right.

    Args:
        names: the methods.
        columns: the table's columns; each cell (accuracy, standard error) in [0, 1], one a method.
    """
    shown = [column for column in columns if not column.is_mean] + [column for column in columns if column.is_mean]
    first_mean = next((i for i, column in enumerate(shown) if column.is_mean), len(shown))
    centres = np.array([i + (0.5 if i >= first_mean else 0.0) for i in range(len(shown))])
    width = 0.82 / len(names)
    inches = min(12.0, max(6.4, 1.0 + 0.19 * (len(names) + 1.2) * len(shown)))
    figure = Figure(figsize=(inches, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        values = np.array([column.cells[i] for column in shown]) * 100
        axes.bar(
            centres + (i - (len(names) - 1) / 2) * width,
            values[:, 0],
            width * 0.92,
            yerr=values[:, 1],
            label=name,
            color=COLOURS[i % len(COLOURS)],
            hatch="" if i < len(COLOURS) else "//",
            error_kw={"elinewidth": 0.9, "ecolor": INK, "capsize": 1.8, "capthick": 0.9},
        )
    top = max(100 * (value + error) for column in shown for value, error in column.cells)
    axes.set_ylim(0, min(104.0, max(1.0, 1.06 * top)))
    axes.set_ylabel("accuracy (%)")
    axes.set_xlim(centres[0] - 0.6, centres[-1] + 0.6)
    longest = max(len(text) for column in shown for text in (column.title, column.label))
    slanted = longest * _LETTER_INCHES > inches / (len(shown) + 1)
    axes.set_xticks(
        centres, [_bar_label(column, " " if slanted else "\n") for column in shown], fontsize=9,
        rotation=30 if slanted else 0, ha="right" if slanted else "center", rotation_mode="anchor" if slanted else None,
    )  # fmt: skip
    if 0 < first_mean < len(shown):
        axes.axvline(
            (centres[first_mean - 1] + centres[first_mean]) / 2, color="#bbbbbb", linewidth=0.9, linestyle=(0, (4, 3))
        )
    clean(axes, grid="y")
    axes.tick_params(axis="x", length=0)
    figure.legend(
        loc="outside upper left", ncols=min(len(names), 6), frameon=False, handlelength=1.1, columnspacing=1.4
    )
    return png(figure)


def _bar_label(column: BarColumn, gap: str) -> str:
    return f"{column.title}{gap}({column.label})" if column.label else column.title


def scatter(names: Sequence[str], points: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> bytes:
    """ID against OOD accuracy, a marker a method: up and to the right is better.

    Args:
        names: the methods.
        points: ((ID accuracy, standard error), (OOD accuracy, standard error)) of each, in [0, 1].
    """
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, ((x, x_error), (y, y_error))) in enumerate(zip(names, points, strict=True)):
        axes.errorbar(
            100 * x, 100 * y, xerr=100 * x_error, yerr=100 * y_error, label=name,
            fmt=MARKERS[i % len(MARKERS)], markersize=7, color=COLOURS[i % len(COLOURS)],
            elinewidth=0.9, markeredgecolor=INK, markeredgewidth=0.6,
        )  # fmt: skip
    axes.set_xlabel("ID accuracy (%)")
    axes.set_ylabel("OOD mean accuracy (%)")
    clean(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)


@dataclass(frozen=True)
class ShiftPoints:
    """A method's test sets: (name, shift, embedding → degree of shift, accuracy in [0, 1])."""

    name: str
    sets: Sequence[tuple[str, str, Mapping[str, float], float]]


def shift_panels(parts: Sequence[str], methods: Sequence[ShiftPoints]) -> bytes:
    """Accuracy against degree of shift, a panel an embedding; a colour a method, a marker a kind of shift.

    Args:
        parts: the embeddings.
        methods: their points; a test set without a degree for an embedding is left out of its panel.
    """
    figure = Figure(figsize=(1.2 + 3.6 * len(parts), 3.9), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, parts, strict=True):
        for i, method in enumerate(methods):
            colour = COLOURS[(i + 1) % len(COLOURS)]
            for name, shift, degrees, accuracy in method.sets:
                if part not in degrees:
                    continue
                axes.plot(
                    degrees[part], 100 * accuracy, marker=SHIFT_MARKERS[shift], markersize=7, color=colour,
                    markeredgecolor=INK, markeredgewidth=0.6, linestyle="none",
                )  # fmt: skip
                if len(methods) == 1:
                    axes.annotate(
                        name, (degrees[part], 100 * accuracy), xytext=(0, 6), textcoords="offset points",
                        fontsize=7, ha="center", color=INK,
                    )  # fmt: skip
        axes.margins(x=0.16, y=0.12)
        axes.set_title(part, fontsize=10, color=INK)
        axes.set_xlabel("Mahalanobis distance")
        clean(axes, grid="both")
    panels[0].set_ylabel("accuracy (%)")
    shifts = dict.fromkeys(shift for method in methods for _, shift, _, _ in method.sets)
    marks = [
        Line2D([], [], marker=SHIFT_MARKERS[shift], color=COLOURS[0], linestyle="none", markeredgecolor=INK,
               markeredgewidth=0.6, label="ID" if shift == "id" else shift)
        for shift in shifts
    ]  # fmt: skip
    if len(methods) > 1:
        marks += [
            Line2D([], [], marker="o", linestyle="none", color=COLOURS[(i + 1) % len(COLOURS)], label=method.name)
            for i, method in enumerate(methods)
        ]
    figure.legend(handles=marks, loc="outside upper left", ncols=6, frameon=False, columnspacing=1.4)
    return png(figure)


def strength_maps(histories: Mapping[str, StrengthHistory]) -> bytes:
    """ω per layer (rows, the input side on top) over steps (columns), a panel a run, one colour scale for all.

    Args:
        histories: run → ω; each with at least one snapshot and one layer.
    """
    shared = len({tuple(history.names) for history in histories.values()}) == 1
    rows = max(len(history.names) for history in histories.values())
    size = (1.9 + 3.4 * len(histories) if shared else 4.8 * len(histories), min(9.0, max(3.0, 1.4 + 0.055 * rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(histories), squeeze=False, sharey=shared)[0]
    top = max((float(np.nanmax(_values(history), initial=0.0)) for history in histories.values()), default=0.0)
    limit = 1.0 if top > 0.5 else next(edge for edge in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if top <= edge)
    colours = colormaps["viridis"].with_extremes(bad="#dddddd")
    mesh = None
    for i, (axes, (name, history)) in enumerate(zip(panels, histories.items(), strict=True)):
        layers = len(history.names)
        mesh = axes.pcolormesh(
            _edges(history.steps), np.arange(layers + 1), np.ma.masked_invalid(_values(history).T),
            cmap=colours, vmin=0, vmax=limit, rasterized=True,
        )  # fmt: skip
        axes.set_ylim(layers, 0)
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        groups = layer_groups(history.names)
        for _, start, _ in groups[1:]:
            if len(groups) <= 40:
                axes.axhline(start, color="white", linewidth=0.4, alpha=0.6)
        if i == 0 or not shared:
            label_groups(axes, groups, layers)
        else:
            axes.tick_params(axis="y", left=False)
        axes.spines[:].set_visible(False)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=list(panels), fraction=0.05, pad=0.02, aspect=28)
        bar.set_label("strength ω")
        bar.outline.set_visible(False)
    return png(figure)


def layer_groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """(label, start, stop) of runs of neighbouring layers of one block.

    A block is a name up to its last numbered part (``vision_model.encoder.layers.3``), or the first two parts of a
    name without numbers; what all labels begin with is left out.
    """
    groups: list[tuple[str, int, int]] = []
    for i, name in enumerate(names):
        numbered = re.match(r"(.*\.)?\d+(?=\.)", name)
        parts = name.split(".")
        label = numbered.group(0) if numbered else ".".join(parts[: min(2, max(1, len(parts) - 1))])
        if groups and groups[-1][0] == label:
            groups[-1] = (label, groups[-1][1], i + 1)
        else:
            groups.append((label, i, i + 1))
    split = [label.split(".") for label, _, _ in groups]
    common = 0
    while len(groups) > 1 and all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [(".".join(parts[common:]), start, stop) for parts, (_, start, stop) in zip(split, groups, strict=True)]


def label_groups(axes: Axes, groups: Sequence[tuple[str, int, int]], layers: int) -> None:
    """A tick in the middle of each block, with as many labels as fit without touching."""
    gap = layers / _MAX_TICKS
    ticks: list[float] = []
    labels: list[str] = []
    for label, start, stop in groups:
        middle = (start + stop) / 2
        if not ticks or middle - ticks[-1] >= gap:
            ticks.append(middle)
            labels.append(_shorten(label))
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.tick_params(axis="y", length=2, color="#888888")


def _shorten(label: str, limit: int = 26) -> str:
    return label if len(label) <= limit else "…" + label[-(limit - 1) :]


def _values(history: StrengthHistory) -> np.ndarray:
    return history.values.numpy()


def _edges(steps: Sequence[int]) -> np.ndarray:
    """[T + 1] borders half-way between snapshots, which need not be evenly spaced."""
    middle = np.asarray(steps, dtype=np.float64)
    if len(middle) == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    inner = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[middle[0] - (inner[0] - middle[0])], inner, [middle[-1] + (middle[-1] - inner[-1])]])


def clean(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)


def png(figure: Figure) -> bytes:
    memory = io.BytesIO()
    scaled = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() != "linear"]
    powers = {text for axis in scaled for text in axis.get_ticklabels(which="both")}  # matplotlib's own formulas: 10⁻³
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)  # users' names may have dollars
    # no software name or date inside: the same results give the same bytes
    figure.savefig(memory, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return memory.getvalue()
