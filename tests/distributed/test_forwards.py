"""Budgets, packing and gradient checkpointing change how a step is computed, not the step: against one process without either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from digrap_scale.config.schema import Config
from tests.data.vqa_samples import vqa_shard
from tests.distributed.forward_runs import run_all_forwards, run_forwards
from tests.distributed.ranks import run_ranks
from tests.distributed.vqa_runs import TRAIN, vqa_config
from tests.models.tiny_vlm import save_tiny_vlm

BACKENDS = ("fsdp2", "zero3", "zero2", "ddp")
SETTINGS: dict[str, dict[str, Any]] = {
    # In micro-batches of one sample: some ranks' have no image, others three.
    "budget": {"max_forward_images": 3},
    # A rank of text takes one forward, and then as many blank ones as the other needs.
    "both": {"max_forward_images": 3, "max_forward_tokens": 90, "pack_tokens": 60},
}


def made(folder: Path, backend: str, data: dict[str, Any], micro: int | None, **training: Any) -> Config:
    values = vqa_config(
        str(folder / "llava"), backend, str(folder / "unused"), str(folder / "train-000000.tar"), "unused.tar"
    ).model_dump()
    values["data"] |= data
    values["training"] |= {"micro_batch_samples": micro, **training}
    return Config.model_validate(values)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "backends", [BACKENDS[:1], pytest.param(BACKENDS[1:], marks=pytest.mark.slow)], ids=lambda names: "-".join(names)
)
def test_a_step_is_the_same_step(backends: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny_vlm("llava", tmp_path / "llava")
    vqa_shard(tmp_path / "train-000000.tar", TRAIN)
    expected = run_forwards(made(tmp_path, "single", {}, None))
    assert expected["counts"] == [[6], [6]]
    cases = {
        f"{backend} {name} {micro}": made(tmp_path, backend, data, micro)
        for backend in backends
        for name, data in SETTINGS.items()
        for micro in ((1,) if name == "budget" else (None,))
    }
    cases |= {
        f"{backend} gradient checkpointing": made(tmp_path, backend, {}, None, gradient_checkpointing=True)
        for backend in backends
    }
    results = run_ranks(2, tmp_path / "ranks", run_all_forwards, cases)
    for name in cases:
        first, second = (rank[name]["counts"] for rank in results)
        assert [len(one) for one in first] == [len(one) for one in second], f"{name}: forwards differ over ranks"
        if "None" in name:
            assert any(len(one) > 1 for one in first) and 0 in [*sum(first, []), *sum(second, [])], f"{name}: {first}"
        for got in results:
            assert got[name]["losses"] == pytest.approx(expected["losses"], rel=2e-4), name
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(
                results[0][name]["weights"][key],
                weight,
                atol=2e-5,
                rtol=1e-5,
                msg=lambda m, n=name, k=key: f"{n} {k}: {m}",
            )
