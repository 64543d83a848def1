"""Degree of shift beside accuracy: a line a test set, and how the two go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.markup import escape
from rich.table import Table

from digrap_scale.evaluation.suite import SuiteResult

NOTE = (
    "Degree of shift: mean Mahalanobis distance of a test set's embeddings to the training set's (docs/evaluation.md)."
)


class Row(Protocol):
    """What is needed of a report's row."""

    @property
    def name(self) -> str: ...
    @property
    def result(self) -> SuiteResult: ...


def parts_of(rows: Sequence[Row]) -> list[str]:
    """The embeddings that were measured in any row, in order; empty where none was."""
    sets = [one for row in rows for one in row.result.sets.values()]
    return list(dict.fromkeys(part for one in sets for part in one.shift_degree))


def heads(rows: Sequence[Row]) -> list[str]:
    """Titles of the table's columns."""
    first = ["method"] if len(rows) > 1 else []
    return [*first, "test set", "shift", "modality", "accuracy", *(f"d {part}" for part in parts_of(rows))]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, a line for each test set of each row that was measured."""
    parts, found = parts_of(rows), []
    for row in rows:
        first = [row.name] if len(rows) > 1 else []
        for name, one in row.result.sets.items():
            if one.shift_degree:
                degrees = [f"{one.shift_degree[part]:.2f}" if part in one.shift_degree else "–" for part in parts]
                shift = "ID" if one.shift == "id" else one.shift
                found.append([*first, name, shift, one.modality, f"{100 * one.accuracy:.1f}", *degrees])
    return found


def correlations(rows: Sequence[Row]) -> list[str]:
    """A line for each row and embedding whose degrees could be set against accuracies."""
    found = []
    for row in rows:
        of = f" of {row.name}" if len(rows) > 1 else ""
        for part, both in row.result.shift_correlations.items():
            if both["pearson"] is None or both["spearman"] is None:
                continue
            found.append(
                f"Accuracy{of} against d {part} over {both['sets']} sets: Pearson {both['pearson']:+.2f}, Spearman "
                f"{both['spearman']:+.2f}."
            )
    return found


def terminal(rows: Sequence[Row]) -> Table:
    """The table for a rich console."""
    table = Table(title="Degree of shift", header_style="bold", title_justify="left")
    titles = heads(rows)
    text = titles.index("accuracy")
    for i, title in enumerate(titles):
        # On a narrow screen words go on in the next line; nothing is cut.
        table.add_column(title, justify="left" if i < text else "right", overflow="fold")
    for line in lines(rows):
        table.add_row(*(escape(cell) for cell in line))
    return table


def markdown(rows: Sequence[Row]) -> list[str]:
    """The table and what goes with it, as lines of markdown; none where nothing was measured."""
    if not parts_of(rows):
        return []
    titles = heads(rows)
    text = titles.index("accuracy")
    found = ["", "## Degree of shift", "", "| " + " | ".join(titles) + " |"]
    found.append("|" + "".join(":--|" if i < text else "--:|" for i in range(len(titles))))
    for line in lines(rows):
        found.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |")
    return [*found, "", f"- {NOTE}", *(f"- {line}" for line in correlations(rows))]
