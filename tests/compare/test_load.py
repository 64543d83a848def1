"""A comparison's YAML is read as strictly as a run's config, and its trials' configs are checked before any runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.compare.grid import TrialMaker, describe_setting, domains, spaces
from digrap_scale.compare.load import load_grid
from digrap_scale.compare.run import compare
from digrap_scale.config import parse_config
from digrap_scale.config.load import dump_config
from digrap_scale.data.check import check_data
from digrap_scale.errors import ConfigError
from tests.compare.grids import base_of, grid_of, write_grid

ROOT = Path(__file__).parents[2]


def problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compare(write_grid(folder, grid_of(folder, **changes)), dry_run=True)
    return caught.value.problems


FT = {"method": {"name": "none"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"budgets": 3}, "unknown key `budgets`; did you mean `budget`?"),
        ({"executor": {"nam": "local"}}, "unknown key `executor.nam`; did you mean `name`?"),
        ({"executor": {"name": "ssh"}}, "executor.name: expected `local` or `submitit`, found `ssh`"),
        ({"budget": 0}, "budget: expected a whole number > 0, found `0`"),
        ({"seeds": []}, "seeds: expected a list (not empty) of whole numbers ≥ 0 and < 4294967296, found a list"),
        ({"methods": {"FT": {}}}, "methods.FT.method: expected a mapping of text to values, found nothing"),
        ({"methods": {"FT": {**FT, "serch": {}}}}, "unknown key `methods.FT.serch`; did you mean `search`?"),
        ({"baseline": "plain"}, "baseline: expected one of the methods (FT, DiGraP), found `plain`"),
        ({"seeds": [1, 1]}, "seeds: expected each value once"),
        ({"search_seeds": 4}, "search_seeds: expected at most the 3 of `seeds`, found 4"),
        ({"wise_ft": {"of": "X", "alphas": [0.5]}}, "wise_ft.of: expected one of the methods (FT, DiGraP), found `X`"),
        ({"shared_search": {"run.seed": [1]}}, "expected no key of run, data, evaluation"),
        ({"methods": {"FT": {**FT, "search": {"optimizer.learning_rate": [1]}}}, "shared_search": {}},
         "expected the learning rate in `shared_search`"),
        ({"methods": {"FT": {**FT, "overrides": {"optimizer.learning_rate": 1}}}},
         "methods.FT.overrides.optimizer.learning_rate: expected it in `shared_search` or here, found it in both"),
        ({"methods": {"FT": {**FT, "search": {"model.lora": [{"rank": 4}]}}}},
         "methods.FT.search.model.lora.0: expected a number, a text or a list, found a mapping"),
        ({"executor": {"timeout_minutes": 5}}, "executor.timeout_minutes: expected nothing with executor.name `local`"),
        ({"methods": {"FT": FT, "WiSE-FT": FT}}, "methods.WiSE-FT: expected another name"),
    ],
)  # fmt: skip
def test_one_line_a_problem(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    found = problems(tmp_path, **changes)
    assert any(expected in line and line.startswith(f"{tmp_path}/grid.yaml:") for line in found), found


def test_the_trials_configs_are_checked_at_once(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, shared_search={"optimizer.learning_rte": [1e-3]})
    grid["methods"]["DiGraP"]["search"] = {"method.strenght_lr": [0.1]}
    with pytest.raises(ConfigError) as caught:
        compare(write_grid(tmp_path, grid), dry_run=True)
    assert any(
        "FT: override `optimizer.learning_rte=0.001`" in line and "`learning_rate`?" in line
        for line in caught.value.problems
    )
    assert any(
        "DiGraP: override `method.strenght_lr=0.1`" in line and "`strength_lr`?" in line
        for line in caught.value.problems
    )


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ({"data.hold_out": None}, "in domain d: data.hold_out: expected a section with `fraction`"),
        ({"evaluation.at_end": False}, "evaluation.at_end: expected `true`, found false"),
        ({"evaluation.suite": [{"name": "x", "shards": ["x.tar"], "shift": "id"}]}, "with shift `near` or `far`, found none"),
        ({"evaluation.suite": [{"name": "x", "shards": ["x.tar"], "shift": "far"}]}, "with shift `id`, found none"),
    ],
)  # fmt: skip
def test_a_trial_must_be_comparable(tmp_path: Path, domain: dict[str, Any], expected: str) -> None:
    found = problems(tmp_path, domains={"d": domain})
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "zero_shot: expected `false` with model.new_head"),
        ({"wise_ft": {"of": "FT", "alphas": [0.5]}}, "wise_ft: expected nothing with model.new_head"),
    ],
)
def test_a_new_head_has_no_pretrained_weights(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    base = base_of(tmp_path)
    base["model"]["new_head"] = True
    assert any(expected in line for line in problems(tmp_path, base=base, **changes))


def test_the_budget_is_the_same_for_all(tmp_path: Path) -> None:
    path = write_grid(tmp_path, grid_of(tmp_path, budget=3))
    found = spaces(load_grid(path))
    assert [len(found[name].settings) for name in ("FT", "DiGraP")] == [2, 3]
    assert [found[name].size for name in ("FT", "DiGraP")] == [2, 4]
    assert found["DiGraP"].settings == spaces(load_grid(path))["DiGraP"].settings
    assert describe_setting(found["FT"].settings[1]) == "learning_rate 0.01"


def test_a_lists_values_are_tried(tmp_path: Path) -> None:
    methods = {"FT": {**FT, "search": {"optimizer.betas": [[0.9, 0.999], [0.9, 0.95]]}}}
    grid = load_grid(write_grid(tmp_path, grid_of(tmp_path, methods=methods, shared_search={})))
    settings = spaces(grid)["FT"].settings
    trials = {setting: TrialMaker(grid, "grid.yaml").train("all", "FT", setting, 0) for setting in settings}
    assert [list(trial.config.optimizer.betas) for trial in trials.values()] == [[0.9, 0.999], [0.9, 0.95]]


def test_what_differs_between_methods_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"FT": FT, "long": {**FT, "overrides": {"training.steps": 9}}}
    compare(write_grid(tmp_path, grid_of(tmp_path, methods=methods)), dry_run=True)
    shown = capsys.readouterr().out
    assert "long: differs in training.steps: 9" in shown and "no method trains more" not in shown
    methods = {"FT": FT, "long": {**FT, "search": {"training.steps": [2, 9]}}}
    compare(write_grid(tmp_path, grid_of(tmp_path, methods=methods)), dry_run=True)
    assert "no method trains more" not in capsys.readouterr().out
    compare(write_grid(tmp_path, grid_of(tmp_path, methods={"FT": FT})), dry_run=True)
    assert "no method trains more" in capsys.readouterr().out


def test_a_trial_has_a_folder_of_its_own_for_each_config(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, grid_of(tmp_path)))
    maker = TrialMaker(grid, "grid.yaml")
    setting = spaces(grid)["DiGraP"].settings[0]
    one, again = (maker.train("all", "DiGraP", setting, 1) for _ in range(2))
    other = maker.train("all", "DiGraP", spaces(grid)["DiGraP"].settings[1], 1)
    assert one.folder == again.folder != other.folder and one.folder.name.startswith("all-digrap-seed1-")
    assert one.config.run.seed == 1 and one.config.run.folder == str(one.folder / "run")
    assert parse_config(dump_config(one.config)) == one.config
    changed = grid_of(tmp_path)
    changed["base"]["training"]["steps"] = 3
    maker = TrialMaker(load_grid(write_grid(tmp_path, changed)), "grid.yaml")
    assert maker.train("all", "DiGraP", setting, 1).folder != one.folder


def test_the_shipped_comparison_is_valid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its shards are there, and each method has the same budget."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    compare("configs/compare/pictograms.yaml", dry_run=True)
    assert "budget: at most 10 settings" in capsys.readouterr().out
    grid = load_grid("configs/compare/pictograms.yaml")
    trial = TrialMaker(grid, "pictograms.yaml").train("noto", "SPD", spaces(grid)["SPD"].settings[0], 0)
    assert check_data(trial.config) == []


def test_the_documents_example_is_read(tmp_path: Path) -> None:
    (example, _) = re.findall(
        r"```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs" / "compare.md").read_text(), re.S
    )
    (tmp_path / "grid.yaml").write_text(example.replace("[...]", "[]"))
    assert set(load_grid(str(tmp_path / "grid.yaml")).methods) == {"FT", "DiGraP", "LoRA"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks" / "robustness").glob("*.yaml")), ids=lambda path: str(path.name)
)
def test_the_studys_comparisons_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config that comes out of them; their sets and models need not be there."""
    monkeypatch.chdir(ROOT)
    grid = load_grid(str(file))
    for domain in domains(grid):
        for method, space in spaces(grid).items():
            TrialMaker(grid, str(file)).train(domain, method, space.settings[0], grid.seeds[0])
