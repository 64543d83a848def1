"""A run that goes on from a checkpoint is the run that was never interrupted: the same bits, on the same ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from digrap_scale.checkpoint.layout import open_checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_runs import run_all, run_here, tensors_of, values_of
from tests.models.tiny import save_vit

LORA = {"lora": {"rank": 2, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model": LORA},
    "bfloat16": {"sharding": {"mixed_precision": "bfloat16"}, "model": {"freeze": ["embeddings"]}},
    "update": {"method": {"name": "digrap_update"}, "data": {"workers": 1}, "checkpoint": {"asynchronous": True}},
    "sgd": {"optimizer": {"name": "sgd", "momentum": 0.9}, "reference": {"previous": "stored"}},
    "ftp": {"method": {"name": "ftp"}},
    # The checkpoint is one within the first phase; one at its end.
    "probe": {"method": {"name": "lp_ft", "head": ["classifier"], "probe_steps": 4}, "schedule": {"warmup_steps": 1}},
    "probed": {"method": {"name": "lp_ft", "head": ["classifier"], "probe_steps": 3}},
    "float16": {"sharding": {"mixed_precision": "float16"}},  # ZeRO's alone
}


KINDS_OF_ONE = ["full", "lora", "ftp", "probe", "probed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def straight_and_resumed(model: Path, folder: Path, backend: str, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Of each kind: the run, and one in another folder that begins with its step-3."""
    runs = {}
    for kind in kinds:
        sections = KINDS[kind]
        runs[kind] = values_of(model, folder / kind, backend, **sections)
        begin = {**sections.get("checkpoint", {}), "resume": str(folder / kind / "checkpoints" / "step-3")}
        again = {**sections, "checkpoint": begin}
        runs[f"{kind}-resumed"] = values_of(model, folder / f"{kind}-resumed", backend, **again)
    return runs


def check_same(folder: Path, kind: str, keys: list[dict[str, list[list[str]]]]) -> None:
    """Weights, moments, ω and generators after the last step, and the samples that led there."""
    straight, resumed = (folder / name / "checkpoints" / "step-6" for name in (kind, f"{kind}-resumed"))
    ours, theirs = tensors_of(resumed), tensors_of(straight)
    before = tensors_of(folder / kind / "checkpoints" / "step-3")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert any(not torch.equal(before[key], value) for key, value in theirs.items()), "nothing was trained"
    moments = {"momentum_buffer"} if kind == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    assert {key.split(".")[-1] for key in ours if key.startswith("optimizer.")} == moments
    assert any(key.startswith("method.previous.") for key in ours) == (kind in ("update", "sgd", "ftp"))
    ours, theirs = (load_file(path / "method.safetensors") for path in (resumed, straight))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items()) and ours.keys() == theirs.keys()
    learned = {"ftp": "gamma", "probe": None, "probed": None}.get(kind, "strength")
    assert learned is None or max(float(v) for key, v in ours.items() if key.startswith(f"{learned}/")) > 0.005
    for rank, of_rank in enumerate(keys):
        assert of_rank[f"{kind}-resumed"] == of_rank[kind][3:] and of_rank[kind], f"rank {rank}: other samples"
        ours, theirs = (load_file(path / "rng" / f"rank-{rank}.safetensors") for path in (resumed, straight))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    ours, theirs = (open_checkpoint(path).state["engine"] for path in (resumed, straight))
    assert ours == theirs and (kind == "float16") == bool(theirs)
    if kind == "float16":
        assert theirs["skipped_steps"] > 0 and theirs["loss_scaler"]["cur_scale"] == 2.0 ** (
            18 - theirs["skipped_steps"]
        )


def check(backend: str, kinds: list[str], model: Path, folder: Path) -> None:
    runs = straight_and_resumed(model, folder, backend, kinds)
    keys = run_ranks(2, folder / "ranks", run_all, runs)
    for kind in kinds:
        check_same(folder, kind, keys)


@pytest.mark.parametrize(("backend", "kinds"), [("fsdp2", ["lora", "sgd", "probe"]), ("zero3", ["full", "float16"])])
def test_bit_for_bit(backend: str, kinds: list[str], model: Path, tmp_path: Path) -> None:
    check(backend, kinds, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3", "ddp", "zero1", "zero2"])
def test_bit_for_bit_whatever_is_trained(backend: str, model: Path, tmp_path: Path) -> None:
    check(backend, [kind for kind in KINDS if kind != "float16" or backend.startswith("zero")], model, tmp_path)


def test_bit_for_bit_in_one_process(model: Path, tmp_path: Path) -> None:
    runs = straight_and_resumed(model, tmp_path, "single", KINDS_OF_ONE)
    keys = [{name: run_here(values) for name, values in runs.items()}]
    for kind in KINDS_OF_ONE:
        check_same(tmp_path, kind, keys)
