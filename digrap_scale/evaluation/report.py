"""Methods × test sets: as JSON, as markdown, in the terminal, and as pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from digrap_scale.errors import ConfigError, SaveError
from digrap_scale.evaluation import plots, shift_report
from digrap_scale.evaluation.strength import StrengthHistory
from digrap_scale.evaluation.suite import SuiteResult

FORMAT_VERSION = 1
ACCURACY_NOTE = (
    "Accuracy in percent, ± standard error of the test set, √(variance of its samples' scores ÷ samples); means are plain "
    "means over sets."
)
_FILE_WIDTH = 140


@dataclass(frozen=True)
class ReportRow:
    """A method's line in the table. ``note`` is shown beside its name."""

    name: str
    result: SuiteResult
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table: (accuracy, standard error) of every row, in [0, 1]."""

    title: str
    kind: str
    cells: list[tuple[float, float]]
    is_mean: bool = False
    modality: str = "none"

    @property
    def label(self) -> str:
        """Shift and modality in a word or two; empty for a mean."""
        if self.is_mean:
            return ""
        shift = "ID" if self.kind == "id" else self.kind
        return shift if self.modality == "none" else f"{shift}, {self.modality}"


def columns(rows: Sequence[ReportRow]) -> list[Column]:
    """ID sets (and their mean, where there are several), OOD sets, near and far mean (where both exist), OOD mean.

    Raises:
        ConfigError: no rows, two of one name, or rows that were not measured on the same test sets.
    """
    if not rows:
        raise ConfigError("nothing to report: no results were given")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ConfigError(f"two rows of the report have one name among {names}; name them apart")
    first = rows[0].result.sets
    for row in rows[1:]:
        here = {name: (one.shift, one.modality) for name, one in row.result.sets.items()}
        if here != {name: (one.shift, one.modality) for name, one in first.items()}:
            raise ConfigError(
                f"{row.name} was measured on {', '.join(here)}, {rows[0].name} on {', '.join(first)}: "
                "evaluate both on the same suite (names, shifts and modalities)"
            )

    def of_sets(*shifts: str) -> list[Column]:
        return [
            Column(
                name,
                one.shift,
                [(row.result.sets[name].accuracy, row.result.sets[name].standard_error) for row in rows],
                modality=one.modality,
            )
            for name, one in first.items()
            if one.shift in shifts
        ]

    def mean(title: str, *shifts: Any) -> list[Column]:
        cells = [(row.result.mean(*shifts), row.result.error(*shifts)) for row in rows]
        found = [(value, error) for value, error in cells if value is not None and error is not None]
        return [Column(title, shifts[0], found, is_mean=True)] if found else []

    id_sets, kinds = of_sets("id"), {one.shift for one in first.values()}
    return [
        *id_sets,
        *(mean("ID mean", "id") if len(id_sets) > 1 else []),
        *of_sets("near", "far"),
        *(mean("near mean", "near") + mean("far mean", "far") if len({"near", "far"} & kinds) == 2 else []),
        *mean("OOD mean", "near", "far"),
    ]


def _cell(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _heading(column: Column) -> str:
    return f"{column.title} ({column.label})" if column.label else column.title


def terminal_table(rows: Sequence[ReportRow], *, width: int = 120) -> Table:
    """The table for a rich console ``width`` characters wide.

    Methods go down and test sets across; where that is too wide the table is turned, then the single errors left out.

    Raises:
        ConfigError: as ``columns``.
    """
    shown = columns(rows)
    largest = max(error for column in shown for _, error in column.cells)
    ruler = Console(width=10_000)
    for turned, errors in ((False, True), (True, True), (False, False), (True, False)):
        title = "Accuracy in percent" + (
            ", ± standard error" if errors else f" (standard errors up to {100 * largest:.1f})"
        )
        table = _table(rows, shown, turned, errors, title)
        if Measurement.get(ruler, ruler.options, table).maximum <= width:
            break
    return table


def _table(rows: Sequence[ReportRow], shown: list[Column], turned: bool, errors: bool, title: str) -> Table:
    table = Table(title=title, header_style="bold", title_justify="left")
    heads = [_heading(column) for column in shown]
    names = [f"{escape(row.name)} [dim]{escape(row.note)}[/dim]" if row.note else escape(row.name) for row in rows]
    cells = [[_cell(*cell) if errors else f"{100 * cell[0]:.1f}" for cell in column.cells] for column in shown]
    if turned:
        table.add_column("test set", no_wrap=True)
        for name in names:
            table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for head, line, column in zip(heads, cells, shown, strict=True):
            table.add_row(escape(head), *line, style="bold" if column.is_mean else None)
        return table
    table.add_column("method", no_wrap=True)
    for head, column in zip(heads, shown, strict=True):
        table.add_column(
            escape(head.replace(" ", "\n", 1)), justify="right", no_wrap=True, style="bold" if column.is_mean else None
        )
    for i, name in enumerate(names):
        table.add_row(name, *(line[i] for line in cells))
    return table


def print_report(rows: Sequence[ReportRow], notes: Sequence[str] = (), console: Console | None = None) -> None:
    """Prints the table and the notes below it."""
    if console is None:
        console = Console()
        if not console.is_terminal:  # a file or a pipe: rich would guess 80 columns and cut names
            console = Console(width=_FILE_WIDTH)
    console.print(terminal_table(rows, width=console.width))
    told = [*notes, *_own_notes(rows)]
    if shift_report.parts_of(rows):
        console.print(shift_report.terminal(rows))
        told += [shift_report.NOTE, *shift_report.correlations(rows)]
    for note in told:
        console.print(f"· {note}", markup=False, highlight=False)


def markdown(rows: Sequence[ReportRow], notes: Sequence[str], pictures: Sequence[str] = ()) -> str:
    """The table, the notes and links to the pictures. Raises: ConfigError as ``columns``."""
    shown = columns(rows)
    lines = ["# Results", ""]
    lines.append("| method | " + " | ".join(_escape(_heading(column)) for column in shown) + " |")
    lines.append("|:--|" + "--:|" * len(shown))
    for i, row in enumerate(rows):
        name = _escape(f"{row.name} ({row.note})" if row.note else row.name)
        lines.append(f"| {name} | " + " | ".join(_cell(*column.cells[i]) for column in shown) + " |")
    lines += ["", f"- {ACCURACY_NOTE}", f"- Samples: {_samples(rows)}."]
    lines += [f"- {note}" for note in [*notes, *_own_notes(rows)]]
    lines += shift_report.markdown(rows)
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem}]({picture})"]
    return "\n".join(lines) + "\n"


def _own_notes(rows: Sequence[ReportRow]) -> list[str]:
    """What the results have to say, by row where there are several."""
    return [
        f"{row.name}: {note}" if len(rows) > 1 else note
        for row in rows
        for note in [*_validation_notes(row.result), *row.result.notes]
    ]


def _validation_notes(result: SuiteResult) -> list[str]:
    """What was withheld from training is to select by: it has a line below the table, not a column in it."""
    return [
        f"withheld from training, to select by: {_cell(one.accuracy, one.standard_error)} on {one.samples} samples"
        for one in result.sets.values()
        if one.shift == "validation"
    ]


def _samples(rows: Sequence[ReportRow]) -> str:
    sizes = {
        name: sorted({row.result.sets[name].samples for row in rows})
        for name, one in rows[0].result.sets.items()
        if one.shift != "validation"
    }
    if len({tuple(size) for size in sizes.values()}) == 1:
        return f"{'–'.join(str(size) for size in next(iter(sizes.values())))} in each test set"
    return ", ".join(f"{name} {'–'.join(str(size) for size in size_list)}" for name, size_list in sizes.items())


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_json(rows: Sequence[ReportRow], notes: Sequence[str]) -> str:
    """The report as JSON; ``rows_from_json`` reads it."""
    stored = {
        "version": FORMAT_VERSION,
        "rows": [{"name": row.name, "note": row.note, "result": row.result.to_dict()} for row in rows],
        "notes": list(notes),
    }
    return json.dumps(stored, indent=2, ensure_ascii=False) + "\n"


def read_report(path: str | Path) -> tuple[list[ReportRow], list[str]]:
    """Rows and notes of a ``results.json``.

    Raises:
        ConfigError: the file is missing or is not a report.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [ReportRow(row["name"], SuiteResult.from_dict(row["result"]), row["note"]) for row in stored["rows"]]
        return rows, list(stored["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a results.json ({type(error).__name__}: {error}); evaluate again") from error


def write_report(
    rows: Sequence[ReportRow],
    folder: str | Path,
    *,
    notes: Sequence[str],
    strength: Mapping[str, StrengthHistory] | None = None,
    scatter: bool = False,
) -> list[Path]:
    """Writes ``results.json``, ``results.md``, ``results.png``; given ω ``strength.png``, given degrees of shift ``shift.png``.

    Args:
        rows: one a method, in the table's order, all on the same test sets.
        folder: where to write; made if missing.
        notes: lines that the table needs to be read rightly (learning rate, seeds, ...).
        strength: run → ω per layer over time; runs without snapshots are left out of the picture.
        scatter: also ``scatter.png``, ID against OOD (needs both).

    Returns:
        The files written.

    Raises:
        ConfigError: rows that do not fit together.
        SaveError: a file cannot be written.
    """
    shown = columns(rows)
    names = [row.name for row in rows]
    histories = {name: history for name, history in (strength or {}).items() if history.steps and history.names}
    files: dict[str, bytes] = {"results.png": plots.bars(names, shown)}
    if histories:
        files["strength.png"] = plots.strength_maps(histories)
    if scatter:
        files["scatter.png"] = plots.scatter(names, _points(rows))
    if parts := shift_report.parts_of(rows):
        files["shift.png"] = plots.shift_panels(parts, [_shift_points(row) for row in rows])
    files["results.md"] = markdown(rows, notes, pictures=list(files)).encode()
    files["results.json"] = to_json(rows, notes).encode()
    return [_write(Path(folder) / name, content) for name, content in files.items()]


def _points(rows: Sequence[ReportRow]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    points = []
    for row in rows:
        result = row.result
        id_mean, id_error, ood_mean, ood_error = (
            result.id_mean,
            result.error("id"),
            result.ood_mean,
            result.error("near", "far"),
        )
        if id_mean is None or id_error is None or ood_mean is None or ood_error is None:
            raise ConfigError("a picture of ID against OOD needs test sets of both kinds in evaluation.suite")
        points.append(((id_mean, id_error), (ood_mean, ood_error)))
    return points


def _shift_points(row: ReportRow) -> plots.ShiftPoints:
    sets = [(name, one) for name, one in row.result.sets.items() if one.shift != "validation"]
    return plots.ShiftPoints(row.name, [(name, one.shift, one.shift_degree, one.accuracy) for name, one in sets])


def _write(path: Path, content: bytes) -> Path:
    """Written beside and renamed, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise SaveError(
            f"cannot save {path}: {error.strerror}; check that the folder is writable and the disk has room"
        ) from error
    return path
