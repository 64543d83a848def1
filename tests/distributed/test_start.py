"""Start-up on two ranks: every rank reads its own slices, and everything is as if the whole model had been loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from digrap_scale.config import Config
from tests.distributed.ranks import run_ranks
from tests.distributed.start_runs import config_of, start_both_ways
from tests.models import tiny

LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


def cases(folder: Path, backend: str) -> dict[str, tuple[Config, int | None]]:
    vit = str(tiny.save_vit(folder / "vit"))
    half = str(tiny.save_vit(folder / "half", dtype=torch.bfloat16))
    clip = str(tiny.save_clip(folder / "clip"))
    plain, low = ({"backend": backend, "mixed_precision": precision} for precision in ("none", "bfloat16"))
    frozen: dict[str, Any] = {"freeze": ["embeddings", "layers.0"]}
    found: dict[str, tuple[Config, int | None]] = {
        "vit": (config_of(vit, "classification", plain), 3),
        "vit bfloat16 file": (config_of(half, "classification", plain), 3),
        "vit mixed frozen": (config_of(vit, "classification", low, **frozen), 3),
        "vit mixed new head": (config_of(vit, "classification", low, new_head=True), 5),
        "vit new head frozen": (config_of(vit, "classification", plain, new_head=True, **frozen), 5),
        "lora": (config_of(vit, "classification", plain, lora=LORA), 3),
        "lora mixed new head": (config_of(vit, "classification", low, lora=LORA, new_head=True), 5),
        "clip": (config_of(clip, "contrastive", plain), None),
        "clip mixed": (config_of(clip, "contrastive", low), None),
        "clip mixed frozen scale": (config_of(clip, "contrastive", low, freeze=["logit_scale", "text_model"]), None),
    }
    if backend == "zero3":  # BatchNorm's own layers
        resnet = str(tiny.save_resnet(folder / "resnet"))
        found["resnet"] = (config_of(resnet, "classification", plain, batch_norm="frozen"), 3)
    return found


IN_EVERY_RUN = ["vit bfloat16 file", "vit mixed frozen", "lora mixed new head", "clip mixed frozen scale"]


@pytest.mark.parametrize(
    "backend, ranks, names",
    [
        ("fsdp2", 3, IN_EVERY_RUN),
        ("zero3", 3, IN_EVERY_RUN[1:3]),
        *(
            pytest.param(backend, ranks, [], marks=pytest.mark.slow)
            for backend, ranks in [("single", 1), ("ddp", 2), ("fsdp2", 3), ("zero1", 2), ("zero2", 3), ("zero3", 3)]
        ),
    ],
)
def test_slices_start_and_step_as_whole_models_do(tmp_path: Path, backend: str, ranks: int, names: list[str]) -> None:
    """Equal bit by bit, in what would be saved before and after a step. On three ranks shards cut rows and are uneven."""
    known = cases(tmp_path, backend)
    chosen = {name: known[name] for name in names or known}
    first = run_ranks(ranks, tmp_path / "ranks", start_both_ways, chosen)[0]
    for name in chosen:
        sliced, whole = first[name]["True"], first[name]["False"]
        assert sliced["loss"] == whole["loss"], name
        for moment in ("before", "after"):
            assert list(sliced[moment]) == list(whole[moment])
            for key, value in whole[moment].items():
                assert sliced[moment][key].dtype == value.dtype, f"{name}: {key}"
                assert torch.equal(sliced[moment][key], value), f"{name} {moment}: {key}"
