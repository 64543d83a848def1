"""Start-up costs a rank its shards and one whole tensor, not the model: private memory, measured while it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from tests.distributed.ranks import run_ranks
from tests.distributed.start_runs import config_of, measure
from tests.models import tiny

RANKS = 2
MIB = 2**20
SLACK = 24 * MIB  # pieces that are read, modules, buffers of communication


def save_large_vit(folder: Path, width: int, layers: int) -> tuple[int, int]:
    """A ViT in bfloat16, as pre-trained weights often are; elements of the model and of its largest tensor."""
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters())


def measured(
    folder: Path, width: int, layers: int, cases: list[str], ways: list[bool], environment: pytest.MonkeyPatch
) -> tuple[dict[str, Any], int, int]:
    # Freed tensors go back to the system at once, as on an accelerator: what is measured is what is held.
    environment.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))
    elements, largest = save_large_vit(folder / "large", width, layers)
    tiny.save_vit(folder / "tiny")
    sharding = {
        "fsdp2": {"backend": "fsdp2"},
        "zero3": {"backend": "zero3"},
        "zero3 mixed": {"backend": "zero3", "mixed_precision": "bfloat16"},
    }
    backends = {case: sharding[case] for case in cases}
    configs = {name: config_of(str(folder / "large"), "classification", s) for name, s in backends.items()}
    warm_up = [config_of(str(folder / "tiny"), "classification", s) for s in backends.values()]
    ranks = run_ranks(RANKS, folder / "ranks", measure, warm_up, configs, ways, start_method="spawn")
    worst = {
        case: {key: max(rank[case][key] for rank in ranks) for key in ("sharded", "peak", "seconds")}
        for case in ranks[0]
    }
    print(f"model {4 * elements / MIB:.0f} MiB in float32")
    for case, found in worst.items():
        sharded, peak = found["sharded"] / MIB, found["peak"] / MIB
        print(f"{case}: until sharded {sharded:.0f} MiB, peak {peak:.0f} MiB, {found['seconds']:.1f} s")
    return worst, elements, largest


# Bytes that a rank holds for each element of its shard: as soon as it is sharded, and at most afterwards, where
# DeepSpeed has the partition that it computes with, a float32 master of it, and a gradient for its dummy first step.
HELD = {"fsdp2": (4, 4), "zero3": (4, 4 + 4 + 4), "zero3 mixed": (2, 2 + 4 + 4)}


def within(case: str, found: dict[str, Any], elements: int, largest: int) -> tuple[bool, bool]:
    """Whether the start stayed below shard + largest tensor + slack: until all is sharded, and to its end."""
    held = HELD[case.rpartition(" ")[0]]
    sharded, peak = (each * (elements // RANKS) + 4 * largest + SLACK for each in held)
    return found["sharded"] < sharded, found["peak"] < peak


@pytest.mark.slow
def test_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models on every rank, the way that it was, fail the same check."""
    worst, elements, largest = measured(tmp_path, 1024, 10, list(HELD), [True, False], monkeypatch)
    assert 4 * elements > 400 * MIB
    for case, found in worst.items():
        if case.endswith("True"):
            assert within(case, found, elements, largest) == (True, True), case
        else:
            assert not within(case, found, elements, largest)[0], case


@pytest.mark.slow
def test_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worst, elements, largest = measured(tmp_path, 512, 12, ["fsdp2", "zero3 mixed"], [True], monkeypatch)
    for case, found in worst.items():
        assert within(case, found, elements, largest) == (True, True), case
