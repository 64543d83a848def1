"""The plan's collectives against those that a real step calls."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.config import parse_config
from digrap_scale.planning.plan import plan
from tests.distributed.ranks import run_ranks
from tests.planning.count import count_all
from tests.planning.small_run import SMALL_BUCKETS, run_of, save_model

UPDATE = {"name": "digrap_update"}
ACCUMULATED = {"global_batch_samples": 12, "micro_batch_samples": 3}
FREEZE = {"freeze": ["embeddings", r"layers?\.0\."]}
# Exact: the bytes of all calls, and how many there are.
FSDP2: list[dict[str, dict[str, Any]]] = [
    {"sharding": {"backend": "fsdp2"}},
    {"sharding": {"backend": "fsdp2", "mixed_precision": "bfloat16"}, "method": UPDATE},
    {"sharding": {"backend": "fsdp2"}, "training": ACCUMULATED, "model": FREEZE},
    {"sharding": {"backend": "fsdp2", "reshard_after_forward": False}, "method": {"name": "none"}},
]
ZERO: list[dict[str, dict[str, Any]]] = [
    {"sharding": {"backend": "zero2", "zero": SMALL_BUCKETS}, "method": UPDATE},
    {"sharding": {"backend": "zero1", "zero": SMALL_BUCKETS, "mixed_precision": "bfloat16"}, "training": ACCUMULATED},
]


def test_collectives_are_those_of_a_step(tmp_path: Path) -> None:
    save_model(tmp_path)
    texts = [run_of(tmp_path, **case) for case in FSDP2 + ZERO]
    counted = run_ranks(2, tmp_path / "ranks", count_all, texts)[0]
    for text, calls in zip(texts, counted, strict=True):
        planned = plan(parse_config(text), 2)
        size: Counter[str] = Counter()
        number: Counter[str] = Counter()
        for one in planned.traffic:
            size[one.collective] += one.payload_bytes
            number[one.collective] += one.count
        for collective in size:
            here = (parse_config(text).sharding.backend, collective, calls)
            if parse_config(text).sharding.backend == "fsdp2":
                assert number[collective] == len(calls[collective]), here
                assert size[collective] == sum(calls[collective]), here
            else:  # padding, and numbers that DeepSpeed's ranks agree on
                assert size[collective] == pytest.approx(sum(calls[collective]), rel=0.1), here
        assert set(calls) == set(size) | (set(calls) & {"all_reduce"})


def test_what_a_rank_sends() -> None:
    from digrap_scale.planning.traffic import Traffic

    assert Traffic("all_reduce", "x", 1, 800, 4).sent_bytes == 1200
    assert Traffic("all_gather", "x", 1, 800, 4).sent_bytes == 600
    assert Traffic("reduce_scatter", "x", 1, 800, 1).sent_bytes == 0


def test_one_process_sends_nothing(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert plan(parse_config(run_of(tmp_path)), 1).traffic == []
