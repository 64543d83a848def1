from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from digrap_scale.errors import ConfigError, SaveError
from digrap_scale.evaluation.plots import layer_groups, png, strength_maps
from digrap_scale.evaluation.report import ReportRow, columns, markdown, print_report, read_report, write_report
from digrap_scale.evaluation.strength import StrengthHistory
from digrap_scale.evaluation.suite import SetResult, SuiteResult


def result(**sets):
    samples = 160
    return SuiteResult(
        {
            name.replace("_", "-"): SetResult(shift, p, math.sqrt(p * (1 - p) / samples), samples, {"cat": p})
            for name, (shift, p) in sets.items()
        }
    )


ROWS = [
    ReportRow("zero-shot", result(lines=("id", 0.25), noto=("near", 0.5), flat=("near", 0.4), photos=("far", 0.3))),
    ReportRow("FT", result(lines=("id", 0.5), noto=("near", 0.4), flat=("near", 0.3), photos=("far", 0.2)), "lr 2e-3"),
]


def history(layers=100, snapshots=30):
    names = [f"vision_model.encoder.layers.{i // 8}.part{i % 8}.weight" for i in range(layers)]
    return StrengthHistory(list(range(10, 10 * snapshots + 1, 10)), names, torch.rand(snapshots, layers))


def titles(rows):
    return [column.title for column in columns(rows)]


def test_columns_in_order():
    assert titles(ROWS) == ["lines", "noto", "flat", "photos", "near mean", "far mean", "OOD mean"]
    assert columns(ROWS)[-1].cells[0][0] == pytest.approx(0.4)


def test_columns_that_say_nothing_new_are_left_out():
    assert titles([ReportRow("FT", result(lines=("id", 0.5)))]) == ["lines"]
    assert titles([ReportRow("FT", result(a=("id", 0.5), b=("id", 0.5), c=("near", 0.1)))]) == [
        "a",
        "b",
        "ID mean",
        "c",
        "OOD mean",
    ]


def shifted():
    """The rows with modalities, as a suite of VQA sets has them."""
    kinds = {"noto": "vision", "flat": "question", "photos": "other"}
    return [
        ReportRow(
            row.name,
            SuiteResult({k: replace(v, modality=kinds.get(k, "none")) for k, v in row.result.sets.items()}),
        )
        for row in ROWS
    ]


def test_what_has_shifted_stands_in_the_tables(tmp_path):
    text = markdown(shifted(), [])
    assert "| method | lines (ID) | noto (near, vision) | flat (near, question) | photos (far, other) |" in text
    console = Console(file=io.StringIO(), width=200)
    print_report(shifted(), [], console)
    assert "(near, vision)" in console.file.getvalue()
    write_report(shifted(), tmp_path, notes=[])
    assert read_report(tmp_path / "results.json") == (shifted(), [])
    with pytest.raises(ConfigError, match="names, shifts and modalities"):
        columns([shifted()[0], ROWS[1]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to report"),
        ([ROWS[0], ROWS[0]], "two rows of the report have one name"),
        ([ROWS[0], ReportRow("FT", result(lines=("id", 0.5)))], "FT was measured on lines, zero-shot on lines, noto"),
    ],
)
def test_rows_must_fit(rows, message):
    with pytest.raises(ConfigError, match=message):
        columns(rows)


def test_markdown_states_what_it_shows():
    text = markdown([*ROWS, ReportRow("a|b", ROWS[0].result)], ["Learning rate 2e-3, seeds 0, 1, 2."], ["results.png"])
    assert "| zero-shot | 25.0 ± 3.4 | 50.0 ± 4.0 |" in text
    assert "| FT (lr 2e-3) |" in text and "| a\\|b |" in text
    assert "- Learning rate 2e-3, seeds 0, 1, 2." in text
    assert (
        "160 in each test set" in text
        and "√(variance of its samples' scores ÷ samples)" in text
        and "binomial" not in text
    )
    assert "![results](results.png)" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_files(tmp_path):
    folder = tmp_path / "run"
    plain = StrengthHistory([], [], torch.zeros(0, 0))
    written = write_report(ROWS, folder, notes=["seed 0"], strength={"DiGraP": history(), "FT": plain}, scatter=True)
    names = {"results.json", "results.md", "results.png", "strength.png", "scatter.png"}
    assert {path.name for path in written} == names == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.verify()
            assert image.width > 500
    assert json.loads((folder / "results.json").read_text())["rows"][1]["result"]["ood_mean"] == pytest.approx(0.3)
    assert read_report(folder / "results.json") == (ROWS, ["seed 0"])


def test_no_strength_no_picture(tmp_path):
    write_report(ROWS, tmp_path, notes=[])
    assert not (tmp_path / "strength.png").exists()
    assert "strength.png" not in (tmp_path / "results.md").read_text()


def test_pictures_are_reproducible(tmp_path):
    for name in ("a", "b"):
        write_report(ROWS, tmp_path / name, notes=[])
    assert (tmp_path / "a/results.png").read_bytes() == (tmp_path / "b/results.png").read_bytes()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot save"):
        write_report(ROWS, tmp_path / "file", notes=[])


def test_not_a_report(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a results.json"):
        read_report(tmp_path / "results.json")
    with pytest.raises(ConfigError, match="is not a results.json"):
        read_report(tmp_path / "missing.json")


@pytest.mark.parametrize("width", [140, 80, 60])
def test_terminal_table_is_never_cut(width):
    console = Console(file=io.StringIO(), width=width)
    print_report([*ROWS, ReportRow("WiSE-FT [0.5]", ROWS[0].result)], ["seed 0"], console)
    text = console.file.getvalue()
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
    for needed in ("50.0", "photos", "OOD", "zero-shot", "[0.5]", "· seed 0", "tandard error"):
        assert needed in text


def test_layers_are_grouped_by_block():
    names = [
        "v.stem.conv.weight",
        "v.stem.bn.bias",
        "v.blocks.0.a.weight",
        "v.blocks.0.b.weight",
        "v.blocks.1.a.weight",
    ]
    assert layer_groups(names) == [("stem", 0, 2), ("blocks.0", 2, 4), ("blocks.1", 4, 5)]
    assert layer_groups(["model.logit_scale"]) == [("model", 0, 1)]
    nested = ["m.stages.0.layers.1.conv.weight", "m.stages.0.layers.2.conv.weight", "head.weight"]
    assert [label for label, _, _ in layer_groups(nested)] == ["m.stages.0.layers.1", "m.stages.0.layers.2", "head"]


@pytest.mark.parametrize(
    "histories",
    [
        {"one": history(1, 1)},
        {"a": history(3, 2), "b": history(700, 5)},
        {"zero": StrengthHistory([1, 5], ["a", "b"], torch.zeros(2, 2))},
        {"holes": StrengthHistory([1, 5], ["a", "b"], torch.tensor([[0.1, math.nan], [math.nan, math.nan]]))},
        {"empty": StrengthHistory([1], ["a"], torch.tensor([[math.nan]]))},
    ],
)
@pytest.mark.filterwarnings("error")
def test_strength_map_takes_any_history(histories):
    with Image.open(io.BytesIO(strength_maps(histories))) as image:
        assert image.format == "PNG" and image.width < 3000 and image.height < 2000


def test_dollars_in_names_are_no_formulas(tmp_path):
    odd = result(**{"a$%$b": ("id", 0.5), "$_$": ("near", 0.4), "x$#1$y": ("far", 0.3)})
    files = write_report([ReportRow("$_$", odd), ReportRow("a$#$", odd)], tmp_path, notes=[], scatter=True)
    assert {file.name for file in files} == {"results.png", "scatter.png", "results.md", "results.json"}


def test_powers_of_ten_on_an_axis_stay_formulas():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1e-3, 10.0], [1, 2])
    axes.set_xscale("log")
    axes.set_title("a$%$b")
    png(figure)
    assert not axes.title.get_parse_math()
    shown = [label for label in axes.get_xticklabels() if "mathdefault" in label.get_text()]
    assert shown and all(label.get_parse_math() for label in shown)
