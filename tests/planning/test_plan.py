"""The verb ``plan``, and what it says of other placements; ``validate``'s disk and shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForImageClassification

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.errors import ConfigError
from digrap_scale.planning import disk
from digrap_scale.planning.plan import alternatives, parse_bytes, plan
from tests.planning.small_run import run_of, save_model, save_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("plan"))
    save_shards(made)
    return made


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("80 gb", 80 * 10**9), ("1.5T", 3 << 39), ("4096", 4096), ("2MiB", 2 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80 parsecs", "-1GiB", "0", "GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--device-memory: expected bytes such as 80GiB, found"):
        parse_bytes(text)


def test_the_verb_needs_only_a_config(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "model" / "config.json", tmp_path / "model")  # and no weights
    shutil.copy(folder / "classes.json", tmp_path)
    (tmp_path / "run.yaml").write_text(run_of(tmp_path, sharding={"backend": "fsdp2"}))
    assert main(["plan", str(tmp_path / "run.yaml"), "--world-size", "3", "--device-memory", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert "820,739 parameters train, 0 do not" in shown and "fits 1 GiB" in shown
    assert "reduce_scatter" in shown and "▸" in shown
    assert "reference: taken to be torch.float32, as config.json says" in shown
    assert "data: not planned: " in shown
    assert main(["plan", str(tmp_path / "run.yaml"), "--world-size", "3", "--device-memory", "1KiB"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit 1 KiB" in shown and "nothing fits 1 KiB: the least is" in shown


def test_shares_of_the_data_are_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(run_of(folder, sharding={"backend": "ddp"}))
    assert main(["plan", str(tmp_path / "run.yaml"), "--world-size", "2"]) == 0
    assert "data: 4 steps an epoch of 12 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sharding", "world_size", "message"),
    [
        ({"backend": "single"}, 2, "sharding.backend: single runs one process"),
        ({"backend": "ddp"}, 5, "training.global_batch_samples: expected a multiple"),
        ({"backend": "fsdp2", "replicas": 2}, 3, "sharding.replicas: expected a divisor"),
        ({"backend": "ddp"}, 0, "--world-size: expected 1 or more, found 0"),
    ],
)
def test_ranks_that_do_not_go(folder: Path, sharding: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(parse_config(run_of(folder, sharding=sharding)), world_size)


def test_alternatives_are_what_the_plan_of_each_says(folder: Path) -> None:
    config = parse_config(run_of(folder, sharding={"backend": "fsdp2"}))
    found = alternatives(config, 2)
    assert {one.backend for one in found} == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    assert [(one.backend, one.offload, one.placement) for one in found if one.chosen] == [("fsdp2", "none", "device")]
    peaks = [one.memory.peak for one in found]
    assert peaks == sorted(peaks)
    for one in found:
        if one.backend in ("ddp", "fsdp2"):
            sections = {"sharding": {"backend": one.backend, "offload": one.offload}}
            text = run_of(folder, **sections, reference={"placement": one.placement})
            assert one.memory == plan(parse_config(text), 2).largest[1]


@pytest.mark.parametrize("precision", ["none", "bfloat16"])
def test_traced_activations_are_what_a_forward_keeps(folder: Path, precision: str) -> None:
    config = parse_config(run_of(folder, sharding={"mixed_precision": precision}))
    (memory,) = plan(config, 1).memory.values()
    model = AutoModelForImageClassification.from_pretrained(folder / "model").train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        outputs = model(pixel_values=torch.zeros(12, 3, 32, 32))
    assert outputs.logits.shape == (12, 3)
    assert memory.device["activations"] == pytest.approx(sum(saved.values()), rel=0.02)


def test_validate_tells_disk_and_shared_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(run_of(folder, checkpoint={"every_steps": 1, "keep_last": 2, "final": True}))
    override = ["sharding.backend=ddp", "data.workers=3"]
    assert main(["validate", str(tmp_path / "run.yaml"), *override, "--world-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "6 loaders (2 ranks × 3) share 4 shards" in shown
    assert "3 checkpoints of 9.39 MiB, final 3.13 MiB" in shown  # weights and two moments in float32
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10 << 20))
    assert main(["validate", str(tmp_path / "run.yaml"), *override]) == 2
    assert "found 10 MiB free; lower checkpoint.keep_last" in capsys.readouterr().err


def test_a_checkpoint_is_as_large_as_planned(folder: Path, tmp_path: Path) -> None:
    sections = {"checkpoint": {"every_steps": 2, "final": True}, "run": {"folder": f"{tmp_path}/run"}}
    text = run_of(folder, **sections, method={"name": "digrap_update"})
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    config = parse_config(text)
    need = disk.disk_need(plan(config, 1).model, config, 4)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*4")
    assert sum(file.stat().st_size for file in newest.rglob("*")) == pytest.approx(need.checkpoint_bytes, rel=0.1)
    final = sum(file.stat().st_size for file in (tmp_path / "run" / "final").rglob("*"))
    assert final == pytest.approx(need.final_bytes, rel=0.1)


def test_gradient_checkpointing_keeps_inputs_and_one_layer(folder: Path) -> None:
    whole = plan(parse_config(run_of(folder)), 1)
    again = plan(parse_config(run_of(folder, training={"gradient_checkpointing": True})), 1)
    layers = whole.model.module.config.num_hidden_layers
    found = whole.memory[0].device["activations"]
    expected = found * 2 / 34 + found / layers
    assert again.memory[0].device["activations"] == pytest.approx(expected, abs=2)
