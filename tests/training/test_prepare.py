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


def copy_of(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    values = json.loads(json.dumps(finished[1]))
    values["run"]["folder"] = str(folder)
    config = (folder / "config.yaml").read_text().replace(str(finished[0]), str(folder))
    (folder / "config.yaml").write_text(config)
    for step in (3, 6):
        (folder / "checkpoints" / f"step-{step}" / "config.yaml").write_text(config)
        recommit(folder / "checkpoints" / f"step-{step}")
    return folder, values


@pytest.fixture
def broken(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of it that broke down in step 5."""
    folder, values = copy_of(finished, tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    status = read_status(folder)
    (folder / "status.json").write_text(json.dumps({**(status or {}), "state": "failed"}))
    return folder, values


def recommit(folder: Path) -> None:
    from digrap_scale.checkpoint import layout

    files = {name: layout.checksum(folder / name) for name in layout.files_of(folder)}
    text = layout.encode({"files": files})
    (folder / layout.CHECKSUMS).write_text(text)
    (folder / layout.COMMITTED).write_text(layout.committed_mark(int(folder.name.removeprefix("step-")), text))


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


@pytest.mark.parametrize(
    "length, told",
    [
        ({"steps": 2, "global_batch_samples": 12}, r"training\.steps: expected 3 or more, those of step-3, found 2"),
        (
            {"epochs": 4, "global_batch_samples": 24},
            r"training\.global_batch_samples: expected 12, that of step-3, with training\.epochs, found 24; set training\.steps",
        ),
        ({"samples": 24, "global_batch_samples": 12}, r"training\.samples: expected 3 steps or more, .* found 2"),
    ],
)
def test_the_length_of_a_run_must_be_what_it_says(
    broken: tuple[Path, dict[str, Any]], length: dict[str, int], told: str
) -> None:
    """Counted in batches of another size, or beyond its end, it would train for longer, or be done without a step."""
    folder, values = broken
    values["training"], values["schedule"] = length, {"warmup_steps": 1}
    values["checkpoint"]["resume"] = str(folder / "checkpoints" / "step-3")
    with pytest.raises(ConfigError, match=told):
        run_here(values)
    assert (folder / "checkpoints" / "step-3" / "COMMITTED").is_file()


def test_another_batch_goes_on_with_a_number_of_steps(broken: tuple[Path, dict[str, Any]]) -> None:
    folder, values = broken
    values["training"] = {"steps": 5, "global_batch_samples": 24}
    values["checkpoint"]["resume"] = str(folder / "checkpoints" / "step-3")
    batches = run_here(values)
    assert [len(keys) for keys in batches] == [24, 24]


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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.yaml", "dcp/__0_0.distcp", "missing"])
def test_damage_removes_nothing(
    name: str, overwrite: bool, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Not even with ``run.overwrite``: a flipped bit does not make another run of it. Exit 3, and what is whole is offered."""
    folder, values = copy_of(finished, tmp_path)
    status = {**(read_status(folder) or {}), "state": "preempted", "exit_code": 75}
    (folder / "status.json").write_text(json.dumps(status))
    values["run"]["overwrite"] = overwrite
    newest = folder / "checkpoints" / "step-6"
    if name == "missing":
        (newest / "config.yaml").unlink()
    else:
        flip(newest / name)
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "status.json"
    }
    with pytest.raises(CheckpointError) as caught:
        run_here(values)
    expected = "config.yaml: missing" if name == "missing" else f"{name}: its SHA-256 differs"
    assert expected in str(caught.value) and "; step-3 is whole: set checkpoint.resume" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    told = read_status(folder) or {}
    assert (told["state"], told["exit_code"], told["step"]) == ("failed", 3, 6) and expected in told["reason"]


def test_an_upgrade_that_adds_keys(broken: tuple[Path, dict[str, Any]]) -> None:
    """A stored config without them is the same run while they are at their defaults."""
    folder, values = broken
    file = folder / "checkpoints" / "step-3" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("  max_skipped_steps:", "  eps:", "  dtype:"))]
    assert len(kept) < len(lines)
    file.write_text("".join(kept))
    recommit(file.parent)
    values["training"]["max_skipped_steps"] = 7
    with pytest.raises(ConfigError, match=r"another config \(training.max_skipped_steps: \d+ → 7\)"):
        run_here(values)
    del values["training"]["max_skipped_steps"]
    assert len(run_here(values)) == 3


def test_a_config_of_another_version(broken: tuple[Path, dict[str, Any]]) -> None:
    """It cannot be compared: neither continued nor replaced."""
    folder, values = broken
    file = folder / "checkpoints" / "step-3" / "config.yaml"
    file.write_text(file.read_text().replace("training:\n", "training:\n  gone_since: 1\n"))
    recommit(file.parent)
    values["run"]["overwrite"] = True
    with pytest.raises(ConfigError, match=r"cannot be read \(config.yaml:\d+: unknown key `training.gone_since`"):
        run_here(values)
    assert (file.parent / "COMMITTED").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_launcher_repeats_a_finished_run(
    variable: str,
    overwrite: bool,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that crashes while it leaves makes it do so: there is nothing to do, and nothing is trained anew."""
    folder, values = copy_of(finished, tmp_path)
    values["run"]["overwrite"] = overwrite
    monkeypatch.setenv(variable, "1")
    status = (folder / "status.json").read_bytes()
    assert run_here(values) == []
    assert (folder / "status.json").read_bytes() == status
    values["optimizer"]["learning_rate"] = 5e-3
    with pytest.raises(
        ConfigError, match=f"repeats \\({variable}=1\\) removes neither" if overwrite else "holds an earlier"
    ):
        run_here(values)
    assert (folder / "checkpoints" / "step-6" / "COMMITTED").is_file()
    assert (folder / "status.json").read_bytes() == status
    monkeypatch.setenv(variable, "0")
    if overwrite:
        assert len(run_here(values)) == 6  # somebody asks for it


def test_a_config_error_is_told(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """Where the folder is there; and it does not count as an earlier run when the error is mended."""
    values = json.loads(json.dumps(finished[1]))
    values["run"]["folder"] = str(tmp_path / "new")
    (tmp_path / "new").mkdir()
    classes, values["data"]["classes"] = values["data"]["classes"], str(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError):
        run_here(values)
    told = read_status(tmp_path / "new") or {}
    assert (told["state"], told["exit_code"]) == ("failed", 2) and "nowhere.json" in told["reason"]
    values["data"]["classes"] = classes
    assert len(run_here(values)) == 6


def test_files_of_others_are_left_alone(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    values = {**finished[1], "run": {"folder": str(tmp_path), "overwrite": True}}
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds no run of ours"):
        run_here(values)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
