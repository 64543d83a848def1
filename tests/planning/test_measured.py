"""The plan's states against the bytes of real objects, on real ranks: within 10 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from digrap_scale.config import parse_config
from digrap_scale.planning.plan import plan
from tests.distributed.ranks import run_ranks
from tests.planning.probe import measure_all
from tests.planning.small_run import SMALL_BUCKETS, run_of, save_model

KINDS = ("weights", "optimizer", "reference", "previous")
# A threshold below the model's matrices, so that ZeRO-3 has weights of both sorts.
ZERO3 = {"backend": "zero3", "zero": {**SMALL_BUCKETS, "persistence_threshold_elements": 1000}}
UPDATE = {"name": "digrap_update"}
CASES: list[dict[str, dict[str, Any]]] = [
    {"sharding": {"backend": "ddp"}, "method": UPDATE},
    {"sharding": {"backend": "ddp"}, "reference": {"placement": "stream"}},
    {"sharding": {"backend": "fsdp2"}, "method": UPDATE},
    {"sharding": {"backend": "fsdp2"}, "reference": {"previous": "stored", "source": "initial", "placement": "cpu"}},
    {"sharding": {"backend": "fsdp2", "mixed_precision": "bfloat16"}, "method": {"name": "none"}},
    {"sharding": {"backend": "fsdp2", "offload": "cpu"}, "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}},
    {"sharding": {"backend": "fsdp2"}, "model": {"freeze": ["embeddings", "layers?\\.0\\."]}, "method": UPDATE},
    {"sharding": {"backend": "fsdp2"}, "model": {"lora": {"rank": 64, "target_modules": ["q_proj", "v_proj"]}}, "method": UPDATE},
    {"sharding": {"backend": "zero1", "zero": SMALL_BUCKETS}, "method": UPDATE},
    {"sharding": {"backend": "zero2", "zero": SMALL_BUCKETS}, "method": UPDATE},
    {"sharding": {"backend": "zero2", "zero": SMALL_BUCKETS, "mixed_precision": "bfloat16"}},
    {"sharding": {"backend": "zero2", "zero": SMALL_BUCKETS, "offload": "cpu"}, "method": UPDATE},
    {"sharding": ZERO3, "method": UPDATE},
    {"sharding": {**ZERO3, "mixed_precision": "bfloat16"}, "method": {"name": "l2sp", "weight": 0.1}},
    {"sharding": {**ZERO3, "mixed_precision": "bfloat16", "offload": "cpu"}, "method": UPDATE},
]  # fmt: skip


REPLICAS: list[dict[str, dict[str, Any]]] = [
    {"sharding": {"backend": "fsdp2", "replicas": 2}, "method": UPDATE},
    {"sharding": {"backend": "fsdp2", "replicas": 2, "mixed_precision": "bfloat16", "reshard_after_forward": False}},
    {"sharding": {"backend": "fsdp2", "replicas": 2, "offload": "cpu"}, "method": UPDATE},
]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        pytest.param(2, CASES[2:13:10], id="2 ranks, two cases"),
        pytest.param(2, CASES, id="2 ranks", marks=pytest.mark.slow),
        pytest.param(3, CASES, id="3 ranks", marks=pytest.mark.slow),
        pytest.param(4, REPLICAS, id="2 copies of 2 ranks", marks=pytest.mark.slow),
    ],
)
def test_states_are_what_is_measured(ranks: int, cases: list[dict[str, dict[str, Any]]], tmp_path: Path) -> None:
    save_model(tmp_path)
    texts = [run_of(tmp_path, **case) for case in cases]
    measured = run_ranks(ranks, tmp_path / "ranks", measure_all, texts)
    for number, text in enumerate(texts):
        config = parse_config(text)
        planned = plan(config, ranks)
        for rank in range(ranks):
            memory, found = planned.memory[rank], measured[rank][number]
            here = f"{config.sharding.backend} rank {rank} case {number}"
            for kind in KINDS:
                wanted = memory.device[kind] + memory.host[kind]
                assert wanted == pytest.approx(found[kind], rel=0.1, abs=4096), f"{here}: {kind}"
            if config.sharding.backend in ("zero1", "ddp"):
                continue  # gradients that are gone when backward returns; buckets that Python does not see
            whole = memory.states + sum(memory.host.values())
            assert whole == pytest.approx(found["all"], rel=0.1), f"{here}: everything"


def test_bfloat16_weights_and_reference(tmp_path: Path) -> None:
    """Reference and optimizer state are as narrow as the weights."""
    save_model(tmp_path, torch.bfloat16)
    text = run_of(tmp_path, sharding={"backend": "fsdp2"}, model={"dtype": "bfloat16"}, method=UPDATE)
    measured = run_ranks(2, tmp_path / "ranks", measure_all, [text])
    for rank, memory in plan(parse_config(text), 2).memory.items():
        for kind in KINDS:
            assert memory.device[kind] == pytest.approx(measured[rank][0][kind], rel=0.1, abs=4096), kind
