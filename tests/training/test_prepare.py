"""What is done with a folder that a run finds: continued, started over, replaced or left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.training.log import read_metrics, read_status
from tests.distributed.resume_runs import run_here, values_of
from tests.models.tiny import save_vit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of six steps with checkpoints of steps 3 and 6, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    values = values_of(save_vit(folder / "vit", classes=16), folder / "run", "single")
    run_here(values)
    return folder / "run", values


@pytest.fixture
def broken(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of it that broke down in step 5."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    status = read_status(folder)
    (folder / "status.json").write_text(json.dumps({**(status or {}), "state": "failed"}))
    values = json.loads(json.dumps(finished[1]))
    values["run"]["folder"] = str(folder)
    config = (folder / "config.yaml").read_text().replace(str(finished[0]), str(folder))
    for file in (folder / "config.yaml", folder / "checkpoints" / "step-3" / "config.yaml"):
        file.write_text(config)
    recommit(folder / "checkpoints" / "step-3")
    return folder, values


def recommit(folder: Path) -> None:
    from digrap_scale.checkpoint import layout

    files = {name: layout.checksum(folder / name) for name in layout.files_of(folder)}
    text = layout.encode({"files": files})
    (folder / layout.CHECKSUMS).write_text(text)
    (folder / layout.COMMITTED).write_text(layout.committed_mark(3, text))


def test_goes_on(broken: tuple[Path, dict[str, Any]]) -> None:
    folder, values = broken
    values["sharding"]["reduce_timeout_s"] = 60  # where and how it computes may change
    assert len(run_here(values)) == 3
    assert "resumed from step-3" in (folder / "messages.log").read_text()
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert (read_status(folder) or {})["state"] == "done"


def test_a_finished_run_is_left_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="holds an earlier run; set run.overwrite: true"):
        run_here(finished[1])


def test_another_config_does_not_go_on(broken: tuple[Path, dict[str, Any]]) -> None:
    _, values = broken
    values["optimizer"]["learning_rate"] = 1e-2
    with pytest.raises(ConfigError, match=r"checkpoint of another config \(optimizer.learning_rate: 0.001 → 0.01\)"):
        run_here(values)


def test_overwritten_it_starts_over(broken: tuple[Path, dict[str, Any]]) -> None:
    """The checkpoint that was found goes with the folder."""
    folder, values = broken
    values["run"]["overwrite"] = True
    values["optimizer"]["learning_rate"] = 2e-3
    assert len(run_here(values)) == 6
    assert "resumed" not in (folder / "messages.log").read_text()


def test_unless_it_is_asked_to(broken: tuple[Path, dict[str, Any]]) -> None:
    folder, values = broken
    values["optimizer"]["learning_rate"] = 1e-2
    values["checkpoint"]["resume"] = str(folder / "checkpoints" / "step-3")
    assert len(run_here(values)) == 3
    assert "changed since step-3: optimizer.learning_rate: 0.001 → 0.01" in (folder / "messages.log").read_text()


def interrupted(folder: Path, *lost: str) -> None:
    """As if the run had been stopped, its checkpoints ``lost`` never written."""
    for name in lost:
        shutil.rmtree(folder / "checkpoints" / name)
    (folder / "status.json").write_text(json.dumps({**(read_status(folder) or {}), "state": "preempted"}))


def test_newer_checkpoints_make_way(broken: tuple[Path, dict[str, Any]]) -> None:
    """Of another way of the same run, they would stand where the new ones belong, and be gone on from later."""
    folder, values = broken
    values["checkpoint"]["keep_last"] = 2
    run_here(values)
    old = (folder / "checkpoints" / "step-6" / "config.yaml").read_text()
    values["optimizer"]["learning_rate"] = 1e-2
    values["checkpoint"]["resume"] = str(folder / "checkpoints" / "step-3")
    assert len(run_here(values)) == 3
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "superseded" / "step-6.1" / "config.yaml").read_text() == old
    assert "learning_rate: 0.01" in (checkpoints / "step-6" / "config.yaml").read_text()
    assert (checkpoints / "step-6" / "COMMITTED").is_file() and (checkpoints / "step-3" / "COMMITTED").is_file()
    assert "step-6 is newer than step-3, which the run goes back to: moved to" in (folder / "messages.log").read_text()


@pytest.mark.parametrize("where", ["its own folder", "another folder"])
def test_the_same_command_goes_on_where_it_was(broken: tuple[Path, dict[str, Any]], tmp_path: Path, where: str) -> None:
    """A launcher that restarts a run which began from a named checkpoint does not lose what was done since."""
    folder, values = broken
    values["checkpoint"]["resume"] = str(folder / "checkpoints" / "step-3")
    values["training"]["steps"] = 9
    if where == "another folder":
        folder = tmp_path / "new"
        values["run"]["folder"] = str(folder)
    assert len(run_here(values)) == 6
    interrupted(folder, "step-9")
    assert len(run_here(values)) == 3  # on from step 6
    interrupted(folder, "step-9", "step-6")
    assert len(run_here(values)) == 6  # nothing saved since it began
    assert not (folder / "checkpoints" / "superseded").exists()
    assert [row["step"] for row in read_metrics(folder)][-6:] == [4, 5, 6, 7, 8, 9]


def test_starts_over_without_a_checkpoint(broken: tuple[Path, dict[str, Any]]) -> None:
    folder, values = broken
    shutil.rmtree(folder / "checkpoints")
    assert len(run_here(values)) == 6
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_never(broken: tuple[Path, dict[str, Any]]) -> None:
    _, values = broken
    values["checkpoint"]["resume"] = "never"
    with pytest.raises(ConfigError, match="holds an earlier run"):
        run_here(values)


def test_no_checkpoint_there(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    values = {**finished[1], "run": {"folder": str(tmp_path / "new")}}
    values["checkpoint"] = {**values["checkpoint"], "resume": str(tmp_path / "nothing")}
    with pytest.raises(CheckpointError, match="nothing: expected a checkpoint's folder"):
        run_here(values)
