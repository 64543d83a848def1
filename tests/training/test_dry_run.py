"""A dry run takes steps as the run would, alone or as one of many, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.errors import ConfigError
from digrap_scale.training.build_run import attach_projector
from digrap_scale.training.dry_run import dry_run
from tests.planning.small_run import run_of, save_model, save_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("dry"))
    save_shards(made)
    return made


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a launcher, earlier in this process, has set what one sets."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("sharding", "world_size"),
    [
        ({"backend": "single"}, None),
        ({"backend": "ddp"}, 3),
        ({"backend": "fsdp2"}, 3),
        ({"backend": "fsdp2", "replicas": 2, "mixed_precision": "bfloat16"}, 4),
    ],
    ids=lambda value: str(value.get("backend") if isinstance(value, dict) else value),
)
def test_steps_are_taken_and_nothing_is_written(
    folder: Path, sharding: dict[str, Any], world_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def watched(run: Any, config: Any) -> Any:
        seen["projector"] = attach_projector(run, config)
        return seen["projector"]

    monkeypatch.setattr("digrap_scale.training.dry_run.attach_projector", watched)
    before = sorted(folder.rglob("*"))
    lines: list[str] = []
    found = dry_run(parse_config(run_of(folder, sharding=sharding)), 2, world_size, lines.append)
    assert len(found.step_s) == 2 and all(step > 0 for step in found.step_s)
    assert found.peak_bytes > found.resident_before_bytes > 0
    assert sorted(folder.rglob("*")) == before
    assert not dist.is_initialized()
    projector = seen["projector"]
    assert projector.report.step == 2 and not projector.report.skipped
    held = sum(spec.numel for spec in projector.backend.specs)
    whole = 820_739
    if sharding["backend"] in ("single", "ddp"):
        assert held == whole
    else:  # rank 0's share
        assert held == pytest.approx(whole / (world_size or 1) * sharding.get("replicas", 1), rel=0.02)
    assert f"rank 0 of {world_size or 1}" in lines[-2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_deepspeed(folder: Path, tmp_path: Path, backend: str) -> None:
    """In a process of its own: DeepSpeed keeps the first group that it sees for good. With a DeepSpeed JSON."""
    theirs = {"zero_optimization": {"reduce_bucket_size": 100_000, "overlap_comm": False}, "gradient_clipping": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    sharding = {"backend": backend, "deepspeed_config": f"{tmp_path}/ds.json"}
    (tmp_path / "run.yaml").write_text(run_of(folder, sharding=sharding))
    before = sorted(folder.rglob("*"))
    words = [sys.executable, "-m", "digrap_scale", "train", str(tmp_path / "run.yaml"), "--dry-run", "2"]
    done = subprocess.run([*words, "--world-size", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "dry run: 2 steps as rank 0 of 3, the others imagined: first" in done.stdout
    assert f"method digrap on {backend}" in done.stdout
    assert sorted(folder.rglob("*")) == before


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "run.yaml"
    file.write_text(run_of(folder))
    assert main(["train", str(file), "--dry-run", "1"]) == 0
    assert "dry run: 1 steps as rank 0 of 1: first" in capsys.readouterr().out
    assert main(["train", str(file), "--world-size", "2"]) == 2
    assert "it is for --dry-run" in capsys.readouterr().err


def test_what_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(run_of(folder))
    with pytest.raises(ConfigError, match="at most the run's 4 steps, found 5"):
        dry_run(config, 5, None, print)
    with pytest.raises(ConfigError, match="single runs one process, found --world-size 2"):
        dry_run(config, 1, 2, print)
    with pytest.raises(ConfigError, match="expected 1 step or more, found 0"):
        dry_run(config, 0, None, print)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher has started this job's processes"):
        dry_run(parse_config(run_of(folder, sharding={"backend": "ddp"})), 1, 2, print)
