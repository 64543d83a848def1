"""Runs from their config, as a launcher starts them: HSDP with CPU offload, adapters under FSDP2 and ZeRO-3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from digrap_scale.cli import main
from tests.models.tiny import save_vit

ASSETS = Path(__file__).parents[2] / "digrap_scale" / "demo" / "assets" / "pictograms"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def config(path: Path, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {"folder": str(folder)},
        "model": {"path": str(path), "task": "classification"},
        "data": {
            "train": [str(ASSETS / "noto-train-*.tar")],
            "classes": str(ASSETS / "classes.json"),
            "shuffle_buffer_samples": 0,
        },
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "global_batch_samples": 8},
        "evaluation": {"suite": [{"name": "noto", "shards": [str(ASSETS / "noto-test-*.tar")], "shift": "id"}]},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return values


def launch(
    ranks: int, values: dict[str, Any], folder: Path, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """``script``: Python that stands in for ``-m digrap_scale``."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    program = ["-m", "digrap_scale"]
    if script is not None:
        (folder / "program.py").write_text(script)
        program = [str(folder / "program.py")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, *program, "train", str(file)], capture_output=True, text=True, check=False, timeout=500
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # tests/distributed/test_engines.py has the same engine against one process
def test_hybrid_sharding_with_offload(model: Path, tmp_path: Path) -> None:
    """Four processes, two copies of the sharded model: trains, saves the whole model, and evaluates as one process does."""
    sharding = {"backend": "fsdp2", "replicas": 2, "offload": "cpu"}
    many = config(model, tmp_path / "many", sharding=sharding, training={"micro_batch_samples": 1})
    done = launch(4, many, tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "many"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "results.md").is_file()
    before = json.loads((run / "results.json").read_text())["rows"][0]["result"]
    assert main(["evaluate", str(tmp_path / "run.yaml"), "--weights", str(run / "final"), "sharding.backend=single",
                 "sharding.replicas=1", "sharding.offload=none"]) == 0  # fmt: skip
    after = json.loads((run / "evaluation" / "results.json").read_text())["rows"][0]["result"]
    assert after == before
    saved, start = load_file(run / "final" / "model.safetensors"), load_file(model / "model.safetensors")
    assert set(saved) == set(start)
    assert all(saved[name].shape == start[name].shape for name in start)
    assert any(not torch.equal(saved[name], start[name]) for name in start)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


@pytest.mark.slow  # test_lora.py and test_vqa_adapters.py have the engines, test_faults.py a launcher
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_adapters(backend: str, model: Path, tmp_path: Path) -> None:
    """Trains on two processes, and plain PEFT loads what it saved; the head's reference is the checkpoint's."""
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    values = config(model, tmp_path / "run", model={"lora": lora}, sharding={"backend": backend})
    done = launch(2, values, tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    saved = load_file(run / "final" / "adapter_model.safetensors")
    assert len([name for name in saved if "lora_B" in name]) == 4 and "base_model.model.classifier.weight" in saved
    assert not any("dense" in name or "embeddings" in name for name in saved), "the base is not saved"
    base = ViTForImageClassification.from_pretrained(model)
    pixels = torch.randn(2, 3, 16, 16)
    before = base(pixels).logits
    adapted = PeftModel.from_pretrained(base, str(run / "final")).eval()
    assert not torch.allclose(adapted(pixels).logits, before, atol=1e-4), "the adapter does nothing"
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            assert value.abs().max() > 0, name
    # The run's own evaluation (with the wrapped model) is that of the saved adapter.
    before_save = json.loads((run / "results.json").read_text())["rows"][0]["result"]
    file = str(tmp_path / "run.yaml")
    assert main(["evaluate", file, "--weights", str(run / "final"), "sharding.backend=single"]) == 0
    assert json.loads((run / "evaluation" / "results.json").read_text())["rows"][0]["result"] == before_save


GROUPS = """
import sys
import torch
import torch.distributed as dist

from digrap_scale import cli
from digrap_scale.training import run

steps = run.train_steps


def looked_at(*arguments, **more):
    groups = list(dist.distributed_c10d._world.pg_map)
    times = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    print(f"groups {len(groups)}, time-outs {sorted(times)}", flush=True)
    return steps(*arguments, **more)


run.train_steps = looked_at
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("zero2", 2), ("hsdp", 4)])
def test_every_group_has_the_time_out(backend: str, ranks: int, model: Path, tmp_path: Path) -> None:
    """Those that DeepSpeed and the mesh make, too: 0.8 of `sharding.reduce_timeout_s`."""
    sharding = {"backend": "fsdp2", "replicas": 2} if backend == "hsdp" else {"backend": backend}
    values = config(model, tmp_path / "run", sharding={**sharding, "reduce_timeout_s": 500})
    values["evaluation"]["suite"] = []
    values["checkpoint"] = {"final": False}
    done = launch(ranks, values, tmp_path, GROUPS)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("groups ")]
    assert len(lines) == ranks and all(line.endswith("time-outs [400.0]") for line in lines), lines
    assert int(lines[0].split()[1].rstrip(",")) > 2


SLOW_START = """
import sys
import time

from digrap_scale import cli
from digrap_scale.training import run

prepare, open_data = run.find_start, run.open_training_data


def slow_on_rank_0(*arguments):
    time.sleep(30)
    return prepare(*arguments)


def slow_on_rank_1(config, once):
    import torch.distributed as dist

    time.sleep(30 * dist.get_rank())
    return open_data(config, once)


run.find_start, run.open_training_data = slow_on_rank_0, slow_on_rank_1
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_preparing_may_take_longer_than_a_collective(model: Path, tmp_path: Path) -> None:
    """Rank 0 looks at the data for 30 s, rank 1 fetches its own for as long; collectives wait 16 s."""
    values = config(model, tmp_path / "run", sharding={"backend": "fsdp2", "reduce_timeout_s": 20})
    done = launch(2, values, tmp_path, SLOW_START)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
