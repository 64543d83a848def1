"""One seed, the same bits; and a run's folder tells what it was made with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from digrap_scale.cli import main
from digrap_scale.evaluation.strength import STRENGTH_FILE
from digrap_scale.training.environment import ENVIRONMENT_FILE, git_state
from digrap_scale.training.log import read_metrics
from tests.planning.small_run import run_of, save_model, save_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("repro"))
    file = made / "model" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "hidden_dropout_prob": 0.1}))  # so that random numbers matter
    save_shards(made)
    return made


def trained(folder: Path, name: str, seed: int) -> Path:
    text = run_of(
        folder, run={"folder": f"{folder}/{name}", "seed": seed, "deterministic": True}, checkpoint={"final": True}
    )
    values = yaml.safe_load(text)
    values["data"] |= {"augment": "crop", "workers": 1}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    try:
        assert main(["train", str(folder / f"{name}.yaml")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    return folder / name


def test_two_runs_with_one_seed_are_equal_bit_by_bit(folder: Path) -> None:
    first, second, other = (trained(folder, name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]

    def told(run: Path) -> list[dict[str, object]]:
        measured = {"samples_per_second", "seconds", "peak_memory_bytes"}
        return [{key: value for key, value in row.items() if key not in measured} for row in read_metrics(run)]

    assert told(first) == told(second) != told(other)
    strength = [(run / STRENGTH_FILE).read_text() for run in (first, second)]
    assert len(strength[0].splitlines()) > 2 and strength[0] == strength[1]


def test_the_folder_tells_what_made_it(folder: Path) -> None:
    run = trained(folder, "told", 3)
    (line,) = (run / ENVIRONMENT_FILE).read_text().splitlines()
    told = json.loads(line)
    assert told["seed"] == 3 and told["deterministic"] is True and told["world_size"] == 1
    assert told["versions"]["torch"] == torch.__version__
    assert {"python", "digrap-scale", "transformers", "numpy"} <= set(told["versions"])
    assert told["git"]["package"] == git_state(Path(__file__).parents[2] / "digrap_scale" / "training")
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] == 3


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    words = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*words, *command], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["changed_files"] == 0
    (tmp_path / "file").write_text("2")
    changed = git_state(tmp_path)
    assert changed is not None and changed["changed_files"] == 1
