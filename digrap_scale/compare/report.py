"""What a comparison leaves: ``results.json``, ``results.md``, the pictures, and one self-contained ``report.html``."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from digrap_scale.checkpoint.atomic import save_error, write_file
from digrap_scale.compare import cost, numbers
from digrap_scale.compare.grid import describe_setting
from digrap_scale.compare.results import Comparison, shown_runs
from digrap_scale.compare.table import BESIDE, Cell, Table, has_domains, markdown, stored

FORMAT_VERSION = 1
REPORT = "report.html"
CAPTIONS = {
    "id_ood": "ID against OOD accuracy, mean ± standard error over seeds. Up and to the right is better.",
    "rates": (
        "Accuracy against the learning rate, on the seeds of the search. Of the settings with one rate, that with the best ID "
        "validation is drawn; the large mark with an edge is the rate that ID validation prefers."
    ),
    "sensitivity": (
        "Sensitivity to each method's own hyper-parameter, on the seeds of the search. OOD is shown, never selected by: of the "
        "settings with one value, that with the best ID validation is drawn."
    ),
    "strength": "ω of each layer over time (first seed): 0 is plain fine-tuning, 1 holds the layer back wholly.",
    "conflicts": "How often each layer's gradient pulled away from the reference, over the whole run (first seed).",
    "drift": "How far each layer has come from the reference (first seed).",
}
PICTURES_OF_A_DOMAIN = ("strength", "conflicts", "drift")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6em 0}
th,td{padding:.25em .7em;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e4e4}
th{border-bottom:2px solid #888}th:first-child,td:first-child{text-align:left}
td small{display:block;color:#666}tr.baseline td{background:#f5f5f5}
figure{margin:1.5em 0}figure img{max-width:100%;height:auto}figcaption{color:#555;font-size:.9em}
.failed{border-left:4px solid #D55E00;padding:.2em 1em;background:#fdf3ec}
"""


def write_all(
    comparison: Comparison, tables: Sequence[Table], pictures: Mapping[str, bytes], folder: Path
) -> list[Path]:
    """Everything, in ``folder``; returns the files. Raises: SaveError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            beside = folder / f".{name}.part"
            beside.write_bytes(content)
            beside.replace(folder / name)
    except OSError as error:
        raise save_error(folder, error) from error
    texts = {
        "results.json": _json(comparison, tables),
        "results.md": _markdown(comparison, tables, list(pictures)),
        REPORT: html(comparison, tables, pictures),
    }
    for name, text in texts.items():
        write_file(folder / name, text)
    return [folder / name for name in (*texts, *pictures)]


def _json(comparison: Comparison, tables: Sequence[Table]) -> str:
    content = {
        "version": FORMAT_VERSION,
        "baseline": comparison.baseline,
        "confidence": comparison.confidence,
        "tables": [stored(table) for table in tables],
        "settings": {row.name: row.settings for row in comparison.rows},
        "runs": numbers.runs(comparison),
        "search": numbers.search(comparison),
        "curve": numbers.curve(comparison),
        "environment": numbers.environment(comparison),
        "costs": {name: vars(one) for name, one in comparison.costs.items()},
        "notes": comparison.notes,
        "failed": comparison.failed,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _markdown(comparison: Comparison, tables: Sequence[Table], pictures: Sequence[str]) -> str:
    parts = ["# Comparison\n", *(f"- **Failed:** {line}" for line in comparison.failed)]
    parts += [markdown(table, comparison.baseline) for table in tables]
    parts += _costs_markdown(comparison)
    parts += ["## Notes\n", *(f"- {note}" for note in comparison.notes), ""]
    parts += [f"![{caption_of(name, comparison)}]({name})\n" for name in pictures]
    return "\n".join(parts)


def _costs_markdown(comparison: Comparison) -> list[str]:
    if not comparison.costs:
        return []
    head, lines = cost.cells_of(comparison.costs, comparison.baseline)
    rows = [head, [":--", *["--:"] * (len(head) - 1)], *lines]
    return ["## Cost of a step\n", cost.CAPTION + "\n", *(f"| {' | '.join(row)} |" for row in rows), ""]


def caption_of(name: str, comparison: Comparison) -> str:
    """A picture's caption, by its file's name: pictures of one domain tell which."""
    kind, _, number = name.removesuffix(".png").partition("-")
    domains = list(shown_runs(comparison))
    if kind not in PICTURES_OF_A_DOMAIN or len(domains) < 2:
        return CAPTIONS[kind]
    return f"{domains[int(number or 0)]}: {CAPTIONS[kind]}"


def html(comparison: Comparison, tables: Sequence[Table], pictures: Mapping[str, bytes]) -> str:
    """One file that needs no other and no network: style and pictures are in it, and its policy forbids to load anything."""
    body = ["<h1>Comparison</h1>"]
    if comparison.failed:
        lines = "".join(f"<li>{escape(line)}</li>" for line in comparison.failed)
        body.append(f'<div class="failed"><p>{len(comparison.failed)} failed:</p><ul>{lines}</ul></div>')
    body += [_table(table, comparison.baseline) for table in tables]
    body.append(
        "<h2>What was done</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in comparison.notes) + "</ul>"
    )
    body.append(_costs(comparison))
    body.append(_search(comparison))
    for name, content in pictures.items():
        data = base64.b64encode(content).decode()
        caption = escape(caption_of(name, comparison))
        body.append(
            f'<figure id="{escape(name.removesuffix(".png"))}"><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(table: Table, baseline: str) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("method", "seeds", *table.columns))
    lines = []
    for name, seeds, line in zip(table.rows, table.seeds, table.cells, strict=True):
        mark = ' class="baseline"' if name == baseline else ""
        lines.append(f"<tr{mark}><td>{escape(name)}</td><td>{seeds}</td>{''.join(map(_cell, line))}</tr>")
    how = f"; below it the paired difference to {baseline} ({'; '.join(table.intervals)})" if table.intervals else ""
    how += f"; the second interval is {BESIDE}" if has_domains(table) else ""
    return (
        f"<h2>{escape(table.title)}</h2><p>Accuracy in percent, mean ± standard error over seeds{escape(how)}. Bold: the best of "
        f"its column, where that interval excludes 0.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _costs(comparison: Comparison) -> str:
    if not comparison.costs:
        return ""
    head, lines = cost.cells_of(comparison.costs, comparison.baseline)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f"<h2>Cost of a step</h2><p>{escape(cost.CAPTION)}</p>"
        f'<div class="scroll"><table class="cost"><thead><tr>{"".join(f"<th>{escape(text)}</th>" for text in head)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _search(comparison: Comparison) -> str:
    """Everything that was tried, with what it was judged by."""
    lines = []
    for point in comparison.points:
        validation = ", ".join(f"{100 * one:.1f}" for one in point.validation)
        cells = (point.domain, point.method, describe_setting(point.setting) or "–", validation)
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("domain", "method", "setting", "ID validation of each seed (%)"))
    return (
        f"<details><summary>The search: {len(lines)} settings, and what they were judged by</summary>"
        f'<div class="scroll"><table class="search"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        "</details>"
    )


def _cell(cell: Cell) -> str:
    text = f"<strong>{cell.text}</strong>" if cell.best else cell.text
    below = f"<small>{cell.difference_text}</small>" if cell.difference is not None else ""
    beside = f"<small>{cell.domains_text}</small>" if cell.domains_text else ""
    return f"<td>{text}{below}{beside}</td>"
