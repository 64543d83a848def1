"""Selection, resume, failures and tables of a comparison, on runs whose numbers the test makes up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from digrap_scale.cli import main
from digrap_scale.compare import pictures
from digrap_scale.compare.grid import Trial
from digrap_scale.compare.run import compare
from tests.compare.grids import MadeUp, grid_of, made_up, write_grid

__all__ = ["made_up"]  # a fixture

Use = Callable[..., MadeUp]


def numbers(trial: Trial) -> Sequence[Sequence[int]]:
    """validation, ID, near, far. FT: the lower rate validates best. DiGraP: μ 0.1 does, though μ 0.01 is far better OOD."""
    setting, seed = dict(trial.setting), 10 * (trial.seed or 0)
    if trial.method == "zero-shot":
        return [[200, 210, 400, 440]]
    high = setting["optimizer.learning_rate"] == 0.01
    if trial.method == "FT":
        return [[500 - 100 * high, 510 + seed, 300 + seed, 200 + seed]]
    if setting["method.strength_lr"] == 0.01:
        return [[480, 520, 900, 900]]
    more = (trial.seed or 0) - 1  # differences to FT are not all alike
    return [[550 - 10 * high, 530 + seed + more, 350 + seed + more, 260 + seed + more]]


def stored(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "results.json").read_text()))


def cells(folder: Path, table: int, method: str) -> dict[str, Any]:
    rows = stored(folder)["tables"][table]["rows"]
    return dict(next(row["cells"] for row in rows if row["method"] == method))


def test_id_validation_selects_and_nothing_else(
    tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = made_up(numbers, pictures=True)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    # Search: 2 FT, 4 DiGraP on seed 0, and zero-shot; then the chosen ones on seeds 1 and 2.
    assert len(runs.ran) == 7 + 4
    assert [(t.method, dict(t.setting), t.seed) for t in runs.ran[7:]] == [
        ("FT", {"optimizer.learning_rate": 0.001}, 1),
        ("FT", {"optimizer.learning_rate": 0.001}, 2),
        ("DiGraP", {"optimizer.learning_rate": 0.001, "method.strength_lr": 0.1}, 1),
        ("DiGraP", {"optimizer.learning_rate": 0.001, "method.strength_lr": 0.1}, 2),
    ]
    assert stored(tmp_path)["settings"]["DiGraP"] == {"all": "learning_rate 0.001, strength_lr 0.1"}
    # Seeds 0, 1, 2: FT near 300, 310, 320, far 200, 210, 220: OOD 250, 260, 270.
    ft, digrap = cells(tmp_path, 0, "FT"), cells(tmp_path, 0, "DiGraP")
    assert ft["OOD mean"]["mean"] == pytest.approx(0.26) and ft["test"]["mean"] == pytest.approx(0.52)
    assert ft["OOD mean"]["standard_error"] == pytest.approx(0.01 / 3**0.5)  # s = 0.01, over √3
    # DiGraP − FT: 54, 55, 56: mean 55, s 1, 55 ± 2.5
    assert digrap["OOD mean"]["difference"]["mean"] == pytest.approx(0.055)
    assert digrap["OOD mean"]["difference"]["kind"] == "Student's t over 3 pairs"
    assert digrap["test"]["best"] and not digrap["sketch"]["best"]  # zero-shot is higher there
    zero = cells(tmp_path, 0, "zero-shot")
    assert zero["sketch"]["mean"] == 0.4 and zero["sketch"]["standard_error"] is None
    # 400 − 300, − 310, − 320: mean 90, s 10, t with two degrees 4.30: 90 ± 24.8
    assert zero["sketch"]["difference"]["low"] == pytest.approx(0.09 - 4.3027 * 0.01 / 3**0.5, abs=1e-4)
    assert zero["sketch"]["best"] and not zero["test"]["best"]
    printed = capsys.readouterr().out
    for line in (
        "searched alike by all methods: optimizer.learning_rate in 0.001, 0.01",
        "DiGraP: own hyper-parameters: method.strength_lr in 0.01, 0.1; tried: all of 4 settings",
        "FT: own hyper-parameters: none; tried: all of 2 settings",
        "budget: at most 4 settings a method and domain, each on 1 seed(s) (0); no method trains more",
        "chosen: DiGraP in all: learning_rate 0.001, strength_lr 0.1",
    ):
        assert line in printed, line
    table = (tmp_path / "out" / "results.md").read_text()
    assert "**54.0 ± 0.6**" in table and "+5.5 [+5.3, +5.7]" in table
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "id_ood.png", "rates.png", "sensitivity.png", "strength.png", "conflicts.png", "drift.png",
    }  # fmt: skip


def test_two_pairs_that_agree_are_no_evidence(tmp_path: Path, made_up: Use) -> None:
    made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path, seeds=[0, 1]))]) == 0
    cell = cells(tmp_path, 0, "DiGraP")["test"]
    assert (
        cell["difference"]["mean"] == pytest.approx(0.0195) and cell["difference"]["low"] is None and not cell["best"]
    )
    table = (tmp_path / "out" / "results.md").read_text()
    assert "no interval: fewer than 3 pairs" in table and "**" not in table


def test_pairs_that_all_agree_are_none_either(tmp_path: Path, made_up: Use) -> None:
    """An interval without width would exclude 0."""
    made_up(lambda trial: [[550, 530, 350, 260]] if trial.method == "DiGraP" else [[500, 510, 300, 200]])
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    cell = cells(tmp_path, 0, "DiGraP")["test"]
    assert cell["difference"]["mean"] == pytest.approx(0.02) and cell["difference"]["low"] is None and not cell["best"]


def test_every_runs_numbers_are_stored(tmp_path: Path, made_up: Use) -> None:
    """Means, differences and intervals can be taken again from them; so can those of the search."""
    made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    found = stored(tmp_path)
    runs = {(run["method"], run["seed"]): run["accuracy"] for run in found["runs"]}
    assert set(runs) == {("zero-shot", None), *((method, seed) for method in ("FT", "DiGraP") for seed in (0, 1, 2))}
    assert [runs["DiGraP", seed]["test"] for seed in (0, 1, 2)] == [0.529, 0.540, 0.551]
    (point,) = [
        p for p in found["search"] if p["setting"] == {"optimizer.learning_rate": 0.01, "method.strength_lr": 0.01}
    ]
    assert point["runs"][0]["seed"] == 0 and point["runs"][0]["accuracy"]["photo"] == 0.9


def test_cost_of_a_step(tmp_path: Path, made_up: Use) -> None:
    """0.875 s, and DiGraP 1 s; the first step counts nowhere, rows without runs of their own have none."""
    made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    costs = stored(tmp_path)["costs"]
    assert costs["FT"] == {"step_s": 0.875, "optimizer_s": 0.125, "peak_bytes": 4 * 2**20}
    assert costs["DiGraP"]["step_s"] == 1.0 and set(costs) == {"FT", "DiGraP"}
    assert "| DiGraP | 1000 | 1.14 | 250.0 | 4 |" in (tmp_path / "out" / "results.md").read_text()


def test_nothing_is_bold_where_the_interval_holds_zero(tmp_path: Path, made_up: Use) -> None:
    def uncertain(trial: Trial) -> Sequence[Sequence[int]]:
        if trial.method != "DiGraP":
            return numbers(trial)
        # Three pairs, +10, +90, +170: the mean is 90 above, its interval ±199.
        return [[500, 510 + 10 + 90 * (trial.seed or 0), 300, 200]]

    made_up(uncertain)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path, zero_shot=False))]) == 0
    cell = cells(tmp_path, 0, "DiGraP")["test"]
    assert cell["mean"] == pytest.approx(0.61) and cell["difference"]["low"] < 0 and not cell["best"]
    assert not cells(tmp_path, 0, "FT")["test"]["best"]
    assert "**" not in (tmp_path / "out" / "results.md").read_text().replace("- **Failed:**", "")


def test_a_second_call_runs_what_is_missing(tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_grid(tmp_path, grid_of(tmp_path))
    first = made_up(numbers)
    assert main(["compare", path]) == 0
    before = (tmp_path / "out" / "report.html").read_text()
    # One was killed in the middle, one has lost its results.
    (first.ran[2].folder / "run" / "status.json").write_text('{"state": "running"}')
    (first.ran[8].folder / "run" / "results.json").unlink()
    capsys.readouterr()
    assert main(["compare", path, "--dry-run"]) == 0
    assert f"first phase: 1 of 7 trials are missing\n·   {first.ran[2].name}" in capsys.readouterr().out

    def clear(trial: Trial) -> Sequence[Sequence[int]]:
        import shutil

        shutil.rmtree(trial.folder / "run")  # the made-up runs go on from nothing
        return numbers(trial)

    second = made_up(clear)
    assert main(["compare", path]) == 0
    assert [trial.folder for trial in second.ran] == [first.ran[2].folder, first.ran[8].folder]
    assert (tmp_path / "out" / "report.html").read_text() == before
    third = made_up(numbers)
    assert main(["compare", path]) == 0 and third.ran == []


def test_a_changed_config_trains_anew_beside_the_old(tmp_path: Path, made_up: Use) -> None:
    first = made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    grid = grid_of(tmp_path)
    grid["base"]["training"]["steps"] = 3
    second = made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid)]) == 0
    assert not {t.folder for t in first.ran} & {t.folder for t in second.ran} and len(second.ran) == 11


def test_failures_are_told_and_others_go_on(tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]) -> None:
    """The chosen μ fails on the other seeds, the high rate in the search: the table has what is there, and the exit code is 1."""
    made_up(
        numbers,
        fails=lambda t: t.method == "DiGraP" and (t.seed or ("optimizer.learning_rate", 0.01) in t.setting),
    )
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 1
    error = capsys.readouterr().err
    assert "4 trials failed" in error and "all: DiGraP (learning_rate 0.001, strength_lr 0.1), seed 1: exit 1" in error
    assert cells(tmp_path, 0, "DiGraP")["test"]["difference"]["low"] is None
    assert len(stored(tmp_path)["failed"]) == 4
    rows = {row["method"]: row["seeds"] for row in stored(tmp_path)["tables"][0]["rows"]}
    assert rows == {"zero-shot": 1, "FT": 3, "DiGraP": 1}


def test_without_a_baseline_there_is_no_table(tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(numbers, fails=lambda trial: trial.method == "FT")
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 1
    assert "no run of the baseline FT is done" in capsys.readouterr().err


def test_a_method_without_a_domain_is_in_no_mean_over_domains(
    tmp_path: Path, made_up: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the table nor in the picture: its other domains are no match for all of them."""
    drawn: list[str] = []
    shown = pictures.Figure.legend

    def legend(figure: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.extend(figure.axes[0].get_legend_handles_labels()[1])
        return shown(figure, *args, **kwargs)

    monkeypatch.setattr(pictures.Figure, "legend", legend)
    made_up(numbers, fails=lambda trial: trial.method == "DiGraP" and trial.domain == "b", pictures=True)
    grid = grid_of(tmp_path, domains={"a": {"data.train": ["a-*.tar"]}, "b": {"data.train": ["b-*.tar"]}})
    assert main(["compare", write_grid(tmp_path, grid)]) == 1
    assert "DiGraP" not in [row["method"] for row in stored(tmp_path)["tables"][0]["rows"]]
    assert "FT" in drawn and "DiGraP" not in drawn


def test_accuracy_is_drawn_against_the_rate(tmp_path: Path, made_up: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DiGraP's two μ that which validates best at a rate (0.1), though the other is far better OOD; marked: the best rate."""
    drawn: list[list[tuple[list[float], list[float]]]] = []
    shown = pictures.png

    def png(figure: Any) -> bytes:
        if figure.axes[0].get_ylabel() == "ID accuracy (%)":
            drawn.extend(
                [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in figure.axes
            )
        return shown(figure)

    monkeypatch.setattr(pictures, "png", png)
    made_up(numbers, pictures=True)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path, seeds=[0]))]) == 0
    ft_id, ft_best, digrap_id, digrap_best = drawn[0]
    assert ft_id == ([0.001, 0.01], [pytest.approx(51.0)] * 2) and digrap_id == (
        [0.001, 0.01],
        [pytest.approx(52.9)] * 2,
    )
    assert (ft_best[0], digrap_best[0]) == ([0.001], [0.001])
    assert drawn[1][2] == ([0.001, 0.01], [pytest.approx(30.4)] * 2)  # (349 + 259) / 2

    one_rate = grid_of(tmp_path, seeds=[0], shared_search={"optimizer.learning_rate": [1e-3]}, out=f"{tmp_path}/out")
    (tmp_path / "out" / "rates.png").unlink()
    assert main(["compare", write_grid(tmp_path, one_rate)]) == 0
    assert not (tmp_path / "out" / "rates.png").exists()


@pytest.mark.parametrize("failing, mean", [("DiGraP", 0.529), ("FT", 0.54)])
def test_means_and_differences_are_of_the_same_seeds(tmp_path: Path, made_up: Use, failing: str, mean: float) -> None:
    """One has seed 0 alone in domain b: over both domains its mean is that of seed 0, and so is the difference."""
    made_up(numbers, fails=lambda trial: trial.method == failing and trial.domain == "b" and bool(trial.seed))
    grid = grid_of(tmp_path, domains={"a": {"data.train": ["a-*.tar"]}, "b": {"data.train": ["b-*.tar"]}})
    assert main(["compare", write_grid(tmp_path, grid)]) == 1
    cell = cells(tmp_path, 0, "DiGraP")["ID mean"]
    # FT 510, 520, 530; DiGraP 529, 540, 551
    assert cell["mean"] == pytest.approx(mean) and cell["difference"]["mean"] == pytest.approx(0.019)
    assert cell["difference"]["pairs"] == 2
    assert cells(tmp_path, 1, "DiGraP")["test"]["difference"]["pairs"] == 3


def test_domains_select_by_themselves_and_are_averaged(tmp_path: Path, made_up: Use) -> None:
    def of_domain(trial: Trial) -> Sequence[Sequence[int]]:
        (validation, *rest), lower = numbers(trial)[0], 100 * (trial.domain == "b")
        if lower:
            validation = 1000 - validation  # the other settings win
        return [[validation, *(number - lower for number in rest)]]

    runs = made_up(of_domain, pictures=True)
    grid = grid_of(tmp_path, domains={"a": {"data.train": ["a-*.tar"]}, "b": {"data.train": ["b-*.tar"]}})
    assert main(["compare", write_grid(tmp_path, grid)]) == 0
    assert len(runs.ran) == 2 * 11
    settings = stored(tmp_path)["settings"]["FT"]
    assert settings == {"a": "learning_rate 0.001", "b": "learning_rate 0.01"}
    assert [table["title"] for table in stored(tmp_path)["tables"]] == ["mean over 2 domains", "a", "b"]
    # ID: a 510, 520, 530; b 410, 420, 430
    assert cells(tmp_path, 0, "FT")["ID mean"]["mean"] == pytest.approx(0.47)
    assert cells(tmp_path, 0, "DiGraP")["ID mean"]["difference"]["kind"] == "bootstrap over 6 pairs"
    assert {"strength.png", "strength-1.png"} <= {path.name for path in (tmp_path / "out").glob("*.png")}


def test_three_domains_have_an_interval_of_domains_too(
    tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    """DiGraP is 1, 2 and 3 points above FT in distribution, with every seed: mean 2, s 1, ± 4.3027/√3 (2.5 points)."""

    def of_domain(trial: Trial) -> Sequence[Sequence[int]]:
        row = list(numbers(trial)[0])
        gain = 10 * (1 + "abc".index(trial.domain)) if trial.method == "DiGraP" else 0
        row[1] = 510 + 10 * (trial.seed or 0) + gain
        return [row]

    made_up(of_domain)
    grid = grid_of(tmp_path, domains={name: {"data.train": [f"{name}-*.tar"]} for name in "abc"})
    assert main(["compare", write_grid(tmp_path, grid)]) == 0
    difference = cells(tmp_path, 0, "DiGraP")["ID mean"]["difference"]
    assert difference["of_domains"] == [pytest.approx(-0.00484, abs=1e-5), pytest.approx(0.04484, abs=1e-5)]
    assert cells(tmp_path, 1, "DiGraP")["test"]["difference"]["of_domains"] is None
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count("With a domain as the unit") == 1 and "[-0.5, +4.5]" in text
    assert "[-0.5, +4.5]</small>" in (tmp_path / "out" / "report.html").read_text()
    assert "as the unit" in capsys.readouterr().out


def test_wise_ft_is_selected_on_id_validation(tmp_path: Path, made_up: Use) -> None:
    def with_alphas(trial: Trial) -> Sequence[Sequence[int]]:
        rows = [list(numbers(trial)[0])]
        if trial.method == "FT":
            assert trial.config.evaluation.interpolate_alphas == [0.0, 0.5, 1.0]
            # α 0.5 validates best; α 0 would be best OOD
            rows += [[100, 200, 900, 900], [600, 530, 380, 280], rows[0]]
        return rows

    made_up(with_alphas)
    grid = grid_of(tmp_path, wise_ft={"of": "FT", "alphas": [0.0, 0.5, 1.0]})
    assert main(["compare", write_grid(tmp_path, grid)]) == 0
    assert stored(tmp_path)["settings"]["WiSE-FT"] == {"all": "α 0.5"}
    assert cells(tmp_path, 0, "WiSE-FT")["OOD mean"]["mean"] == pytest.approx(0.33)


def test_two_comparisons_do_not_share_a_folder(
    tmp_path: Path, made_up: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(numbers)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 2
    assert "is in use by another comparison" in capsys.readouterr().err


def test_the_choice_of_zero_shot_needs_no_seed_and_no_training(tmp_path: Path, made_up: Use) -> None:
    runs = made_up(numbers)
    assert main(["compare", write_grid(tmp_path, grid_of(tmp_path))]) == 0
    assert [trial.verb for trial in runs.ran if trial.seed is None] == ["evaluate"]


def test_a_narrow_terminal_keeps_id_and_means(tmp_path: Path, made_up: Use) -> None:
    made_up(numbers)
    console = Console(width=90, file=(file := io.StringIO()))
    compare(write_grid(tmp_path, grid_of(tmp_path)), console=console)
    table = file.getvalue().split("·")[0]
    assert "sketch" not in table and "54.0 ± 0.6" in table and "+5.5 [+5.3, +5.7]" in table and "…" not in table
