"""Tables of a comparison: one a domain, and one over all domains. The same cells in the terminal, in markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

from digrap_scale.compare.results import MEANS, Comparison, Row, by_seed, columns_of, domains_of, means_of, value, whole
from digrap_scale.compare.statistics import Difference, mean_and_error, paired_difference
from digrap_scale.evaluation.suite import SuiteResult

BESIDE = (
    "with a domain as the unit (Student's t), which speaks of other domains of the kind, not of other seeds in these"
)
Results = Mapping[str, Mapping[int | None, SuiteResult]]


@dataclass(frozen=True)
class Cell:
    """A method on a test set (or a mean of several).

    Attributes:
        mean, error: over seeds, in [0, 1]; the error is None for one seed.
        difference: paired, to the baseline; None in its own row.
        best: the highest of its column by its difference, and above the baseline by an interval that excludes 0.
    """

    mean: float
    error: float | None
    difference: Difference | None
    best: bool = False

    @property
    def text(self) -> str:
        """``41.2 ± 0.8``, in percent."""
        return f"{100 * self.mean:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")

    @property
    def difference_text(self) -> str:
        """``+1.9 [+0.4, +3.3]``, in percentage points."""
        if self.difference is None:
            return "–"
        one = self.difference
        interval = (
            " (no interval)"
            if one.low is None or one.high is None
            else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
        )
        return f"{100 * one.mean:+.1f}{interval}"

    @property
    def domains_text(self) -> str:
        """``[-0.2, +3.9]``: the interval with the domain as the unit, in percentage points; empty where there is none beside."""
        beside = None if self.difference is None else self.difference.of_domains
        return "" if beside is None else f"[{100 * beside[0]:+.1f}, {100 * beside[1]:+.1f}]"


@dataclass(frozen=True)
class Table:
    """Methods down, test sets across.

    Attributes:
        cells: [rows][columns].
        seeds: how many each row has.
        intervals: the ways in which intervals were made, in words.
    """

    title: str
    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]]
    seeds: list[int]
    intervals: list[str]


def tables_of(comparison: Comparison) -> list[Table]:
    """A table for each domain; where there are several, before them one of the means over domains."""
    domains = domains_of(comparison)
    tables = []
    if len(domains) > 1:
        rows = whole(comparison)
        columns = _shared_means([result for row in rows for one in row.results.values() for result in one.values()])
        if rows:
            tables.append(_table(f"mean over {len(domains)} domains", columns, rows, domains, comparison))
    for domain in domains:
        rows = [row for row in comparison.rows if row.results.get(domain)]
        columns = columns_of([result for row in rows for result in row.results[domain].values()])
        tables.append(_table(domain, columns, rows, [domain], comparison))
    return tables


def _shared_means(results: Sequence[SuiteResult]) -> list[str]:
    """ID and the means that every domain has."""
    common = [set(means_of(result)) for result in results]
    return ["ID mean", *(name for name in ("near mean", "far mean", "OOD mean") if all(name in one for one in common))]


def _table(
    title: str, columns: list[str], rows: Sequence[Row], domains: Sequence[str], comparison: Comparison
) -> Table:
    results = [{domain: row.results[domain] for domain in domains} for row in rows]
    base = next((one for row, one in zip(rows, results, strict=True) if row.name == comparison.baseline), None)
    cells: list[list[Cell]] = []
    for row, one in zip(rows, results, strict=True):
        line = []
        for column in columns:
            mean, error = mean_and_error(list(by_seed(one, column).values()))
            difference = None
            if base is not None and row.name != comparison.baseline:
                difference = _difference(one, base, column, comparison)
            line.append(Cell(mean, error, difference))
        cells.append(line)
    for number in range(len(columns)):
        _mark_best([line[number] for line in cells], cells, number)
    kinds = dict.fromkeys(c.difference.how for line in cells for c in line if c.difference)
    counts = [len(by_seed(one, columns[0])) for one in results]
    return Table(title, columns, [row.name for row in rows], cells, counts, list(kinds))


def _mark_best(column: list[Cell], cells: list[list[Cell]], number: int) -> None:
    """Only where the highest is above the baseline beyond doubt; the baseline itself is never marked.

    By the paired differences: where runs are missing, means are of different seeds.
    """
    gains = [0.0 if cell.difference is None else cell.difference.mean for cell in column]
    highest = gains.index(max(gains))
    best = column[highest]
    if best.difference is not None and best.difference.mean > 0 and best.difference.excludes_zero:
        cells[highest][number] = Cell(best.mean, best.error, best.difference, best=True)


def _difference(one: Results, base: Results, column: str, comparison: Comparison) -> Difference | None:
    """Of runs that share domain and seed; weights without a seed are set against every seed of the baseline."""
    # The seeds that every domain has, of both: as in the means.
    ours, shown = by_seed(one, column), set(by_seed(base, column))
    if None not in ours:
        shown &= set(ours)
    pairs: dict[str, list[float]] = {}
    for domain, of_domain in base.items():
        mine = one[domain]
        found = [
            value(mine[seed if seed in mine else None], column) - value(result, column)
            for seed, result in of_domain.items()
            if seed in shown
        ]
        if found:
            pairs[domain] = found
    if len(pairs) < len(base):
        return None
    return paired_difference(pairs, confidence=comparison.confidence, samples=comparison.bootstrap_samples)


def terminal(table: Table, width: int) -> RichTable:
    """For a rich console ``width`` characters wide: where all columns do not fit, without the single OOD sets.

    The paired difference in the OOD mean stands last.
    """
    ruler = Console(width=10_000)
    whole = _rich(table, list(range(len(table.columns))))
    if Measurement.get(ruler, ruler.options, whole).maximum <= width:
        return whole
    return _rich(table, [0, *(i for i, column in enumerate(table.columns) if i > 0 and column in MEANS)])


def _rich(table: Table, chosen: Sequence[int]) -> RichTable:
    shown = RichTable(title=f"{table.title}: accuracy in percent", header_style="bold", title_justify="left")
    shown.add_column("method", no_wrap=True)
    for number in chosen:
        shown.add_column(escape(table.columns[number].replace(" ", "\n", 1)), justify="right", no_wrap=True)
    shown.add_column("OOD, paired\ndifference", justify="right", no_wrap=True)
    beside = has_domains(table)
    if beside:
        shown.add_column("OOD, domain\nas the unit", justify="right", no_wrap=True)
    for name, line in zip(table.rows, table.cells, strict=True):
        cells = [f"[bold]{line[number].text}[/bold]" if line[number].best else line[number].text for number in chosen]
        ends = [line[-1].difference_text, *([line[-1].domains_text or "–"] if beside else [])]
        shown.add_row(escape(name), *cells, *map(escape, ends))
    return shown


def markdown(table: Table, baseline: str) -> str:
    """The accuracies, and below them the paired differences."""
    head = "| method | seeds | " + " | ".join(_plain(column) for column in table.columns) + " |"
    rule = "|:--|--:|" + "--:|" * len(table.columns)
    lines = [f"## {table.title}", "", "Accuracy in percent, mean ± standard error over seeds.", "", head, rule]
    for name, seeds, line in zip(table.rows, table.seeds, table.cells, strict=True):
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in line]
        lines.append(f"| {_plain(name)} | {seeds} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Paired differences to {baseline}, in points ({'; '.join(table.intervals) or 'none'}).",
        "",
        head,
        rule,
    ]

    def against_baseline(text: Callable[[Cell], str]) -> list[str]:
        return [
            f"| {_plain(name)} | {seeds} | {' | '.join(map(text, line))} |"
            for name, seeds, line in zip(table.rows, table.seeds, table.cells, strict=True)
            if name != baseline
        ]

    lines += against_baseline(lambda cell: cell.difference_text)
    if has_domains(table):
        lines += ["", f"{BESIDE[0].upper()}{BESIDE[1:]}:", "", head, rule]
        lines += against_baseline(lambda cell: cell.domains_text or "–")
    return "\n".join(lines) + "\n"


def has_domains(table: Table) -> bool:
    """Whether intervals with the domain as the unit stand beside the others."""
    return any(cell.domains_text for line in table.cells for cell in line)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def stored(table: Table) -> dict[str, object]:
    """As JSON."""
    return {
        "title": table.title,
        "columns": table.columns,
        "intervals": table.intervals,
        "rows": [
            {
                "method": name,
                "seeds": seeds,
                "cells": {
                    column: {
                        "mean": cell.mean,
                        "standard_error": cell.error,
                        "difference": vars(cell.difference) if cell.difference else None,
                        "best": cell.best,
                    }
                    for column, cell in zip(table.columns, line, strict=True)
                },
            }
            for name, seeds, line in zip(table.rows, table.seeds, table.cells, strict=True)
        ],
    }
