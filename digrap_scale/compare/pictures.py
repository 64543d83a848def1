"""The pictures of a comparison, as PNG bytes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from digrap_scale.compare.load import WISE_FT
from digrap_scale.compare.results import Comparison, SearchPoint, by_seed, domains_of, score, shown_runs, whole
from digrap_scale.compare.statistics import mean_and_error
from digrap_scale.evaluation.layers import LayerHistory, read_layers
from digrap_scale.evaluation.plots import COLOURS, INK, MARKERS, clean, label_groups, layer_groups, png, strength_maps
from digrap_scale.evaluation.strength import read_strength

_OOD = ("near", "far")
_RATE = "optimizer.learning_rate"


def draw(comparison: Comparison) -> dict[str, bytes]:
    """File name → picture, of all that the trials have told enough for."""
    files = {"id_ood.png": id_against_ood(comparison)} if whole(comparison) else {}
    if (rates := rate_panels(comparison)) is not None:
        files["rates.png"] = rates
    if (sensitivity := sensitivity_panels(comparison)) is not None:
        files["sensitivity.png"] = sensitivity
    runs = shown_runs(comparison)
    for domain, rows in runs.items():
        suffix = f"-{number}" if (number := list(runs).index(domain)) else ""
        files |= {f"{name}{suffix}.png": picture for name, picture in _of_layers(domain, rows).items()}
    return files


def id_against_ood(comparison: Comparison) -> bytes:
    """Mean ID against mean OOD accuracy, ± standard error over seeds; WiSE-FT's α as a curve. Up and right is better.

    Of the rows that have every domain.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(whole(comparison)):
        (x, x_error), (y, y_error) = (
            mean_and_error(list(by_seed(row.results, c).values())) for c in ("ID mean", "OOD mean")
        )
        axes.errorbar(
            100 * x, 100 * y, xerr=100 * (x_error or 0), yerr=100 * (y_error or 0), label=row.name,
            fmt=MARKERS[i % len(MARKERS)], markersize=7, color=COLOURS[i % len(COLOURS)], elinewidth=0.9,
            markeredgecolor=INK, markeredgewidth=0.6, zorder=3,
        )  # fmt: skip
    curve = {alpha: found for alpha, found in comparison.curve.items() if set(found) == set(domains_of(comparison))}
    if curve:
        points = [
            [
                100 * fmean(fmean(score(r, shifts) for r in results) for results in of_domain.values())
                for shifts in (("id",), _OOD)
            ]
            for of_domain in curve.values()
        ]
        axes.plot(
            *zip(*points, strict=True),
            color="#999999",
            linewidth=1.2,
            marker=".",
            markersize=4,
            label=f"{WISE_FT}, all α",
        )
        for alpha, point in zip(curve, points, strict=True):
            axes.annotate(
                f"{alpha:g}",
                (point[0], point[1]),
                xytext=(4, -8),
                textcoords="offset points",
                fontsize=7,
                color="#777777",
            )
    axes.set_xlabel("ID accuracy (%)")
    axes.set_ylabel("OOD mean accuracy (%)")
    clean(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)


def rate_panels(comparison: Comparison) -> bytes | None:
    """ID and OOD accuracy of every method against the learning rate, on the seeds of the search; None where one was tried.

    Of the settings with one rate, that with the best ID validation is shown, in every domain by itself. A mark with a dark edge
    is the rate that ID validation prefers, by its mean over domains.
    """
    lines = {name: _at_values(comparison, name, _RATE) for name in dict.fromkeys(p.method for p in comparison.points)}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title, read in zip(panels, ("ID accuracy (%)", "OOD mean accuracy (%)"), (_id, _ood), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            colour, marker = COLOURS[(i + 1) % len(COLOURS)], MARKERS[i % len(MARKERS)]
            values = [100 * read(point) for point in points]
            rates = [point.value for point in points]
            axes.plot(rates, values, marker=marker, color=colour, markersize=5, linewidth=1.3, label=name)
            best = max(range(len(points)), key=lambda number: points[number].validation)
            axes.plot(rates[best], values[best], marker=marker, color=colour, markersize=7, markeredgecolor=INK)
        axes.set_xscale("log")
        shown = sorted({point.value for points in lines.values() for point in points})
        axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(_RATE.split(".")[-1])
        axes.set_ylabel(title)
        clean(axes, grid="both")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return png(figure)


def sensitivity_panels(comparison: Comparison) -> bytes | None:
    """OOD (and, dashed, ID validation) against each method's own hyper-parameter, a panel a method; None where none has one.

    Of the settings with one value of it, that with the best ID validation is shown, in every domain by itself.
    """
    lines = {
        name: found
        for name in dict.fromkeys(p.method for p in comparison.points)
        if (found := _curve(comparison, name))
    }
    if not lines:
        return None
    figure = Figure(figsize=(1.0 + 2.9 * len(lines), 3.6), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
    flat = _baseline_ood(comparison)
    for i, (axes, (name, (key, points))) in enumerate(zip(panels, lines.items(), strict=True)):
        x, ood, validation = (np.array([read(p) for p in points]) for read in (_value, _ood, _validation))
        colour = COLOURS[(i + 1) % len(COLOURS)]
        axes.plot(x, 100 * ood, marker="o", color=colour, label="OOD")
        axes.plot(
            x, 100 * validation, marker=".", color=colour, linestyle=(0, (4, 3)), linewidth=1, label="ID validation"
        )
        if flat is not None:
            axes.axhline(100 * flat, color="#8c8c8c", linewidth=1, label=f"{comparison.baseline}, OOD")
        if x.min() > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=float(x[x > 0].min()))
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xlabel(key.split(".")[-1])
        clean(axes, grid="both")
        if i == 0:
            axes.set_ylabel("accuracy (%)")
            axes.legend(frameon=False, fontsize=8)
    return png(figure)


@dataclass(frozen=True)
class _Point:
    """A method with one value of a hyper-parameter: means over domains, and over the seeds of the search."""

    value: float
    id: float
    ood: float
    validation: float


_value, _id, _ood, _validation = (operator.attrgetter(name) for name in ("value", "id", "ood", "validation"))


def _curve(comparison: Comparison, method: str) -> tuple[str, list[_Point]] | None:
    """(key, its points) of the first hyper-parameter that is the method's own and has several numbers."""
    points = [point for point in comparison.points if point.method == method]
    shared = _shared_keys(comparison)
    for key, _ in points[0].setting:
        if key not in shared and len(found := _at_values(comparison, method, key)) > 1:
            return key, found
    return None


def _at_values(comparison: Comparison, method: str, key: str) -> list[_Point]:
    """The numbers that a method tried for a hyper-parameter in every domain, from the least on; [] where it has none."""
    points = [point for point in comparison.points if point.method == method and key in dict(point.setting)]
    values = sorted({value for point in points if _is_number(value := dict(point.setting)[key])})
    of_value = {value: [point for point in points if dict(point.setting)[key] == value] for value in values}
    everywhere = set(domains_of(comparison))
    return [_best_of(v, found) for v, found in of_value.items() if {p.domain for p in found} == everywhere]


def _best_of(value: float, points: Sequence[SearchPoint]) -> _Point:
    """Of these settings the one that ID validation prefers, in every domain by itself."""
    best: dict[str, SearchPoint] = {}
    for point in points:
        known = best.get(point.domain)
        if known is None or fmean(point.validation) > fmean(known.validation):
            best[point.domain] = point
    chosen = best.values()
    return _Point(
        value,
        fmean(p.mean("id") for p in chosen),
        fmean(p.mean(*_OOD) for p in chosen),
        fmean(fmean(p.validation) for p in chosen),
    )


def _shared_keys(comparison: Comparison) -> set[str]:
    """Hyper-parameters that every method was searched over."""
    of_methods: dict[str, set[str]] = {}
    for point in comparison.points:
        of_methods.setdefault(point.method, set()).update(key for key, _ in point.setting)
    return set.intersection(*of_methods.values()) if len(of_methods) > 1 else set()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _baseline_ood(comparison: Comparison) -> float | None:
    """Of the baseline's setting with the best ID validation, on the seeds of the search."""
    points = [point for point in comparison.points if point.method == comparison.baseline]
    return _best_of(0.0, points).ood if points else None


def _of_layers(domain: str, runs: Sequence[tuple[str, Any]]) -> dict[str, bytes]:
    strengths = {f"{name}, {domain}": read_strength(folder) for name, folder in runs}
    strengths = {name: history for name, history in strengths.items() if history.steps and history.names}
    histories = {name: history for name, folder in runs if (history := read_layers(folder)) is not None}
    files = {}
    if strengths:
        files["strength"] = strength_maps(strengths)
    if histories:
        rates = {name: history.whole_rate for name, history in histories.items()}
        drifts = {name: history.drift[-1] for name, history in histories.items()}
        files["conflicts"] = layer_map(histories, rates, f"share of steps in conflict, {domain}", 1.0)
        files["drift"] = layer_map(histories, drifts, f"drift ‖θ − θ₀‖ at the end, {domain}", None)
    return files


def layer_map(
    histories: Mapping[str, LayerHistory], values: Mapping[str, np.ndarray], title: str, top: float | None
) -> bytes:
    """A number for each layer (rows, the input side on top) and method (columns).

    Args:
        histories: method → its layers.
        values: method → [L] numbers, of the layers of ``histories``.
        title: of the colours.
        top: end of the colour scale; None: the largest number.
    """
    names = list(dict.fromkeys(name for history in histories.values() for name in history.names))
    rows = {name: i for i, name in enumerate(names)}
    table = np.full((len(names), len(values)), np.nan)
    for column, (method, numbers) in enumerate(values.items()):
        table[[rows[name] for name in histories[method].names], column] = numbers
    figure = Figure(
        figsize=(2.6 + 0.75 * len(values), min(9.0, max(3.2, 1.6 + 0.055 * len(names)))), layout="constrained"
    )
    axes = figure.add_subplot()
    colours = colormaps["magma"].with_extremes(bad="#dddddd")
    limit = top if top is not None else max(float(np.nanmax(table)), 1e-12)
    mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap=colours, vmin=0, vmax=limit, rasterized=True)
    axes.set_ylim(len(names), 0)
    axes.set_xticks(
        np.arange(len(values)) + 0.5, list(values), rotation=35, ha="right", rotation_mode="anchor", fontsize=8
    )
    label_groups(axes, layer_groups(names), len(names))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.08, pad=0.03, aspect=28)
    bar.set_label(title)
    bar.outline.set_visible(False)
    return png(figure)
