"""Shards tile every parameter once, views are what the frameworks say, the rest is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.toy import make_toy
from tests.sharding.shard_runs import Partly, Scaled, fsdp2_shards, three_ranks, two_ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("two"), two_ranks)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(3, tmp_path_factory.mktemp("three"), three_ranks)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"fsdp2": got} for got in run_ranks(5, tmp_path_factory.mktemp("five"), fsdp2_shards)]


RANKS = ["two", "three", pytest.param("five", marks=pytest.mark.slow)]


def assert_tiles(name: str, numel: int, intervals: list[list[int]]) -> None:
    filled = sorted(interval for interval in intervals if interval[0] < interval[1])
    edges = [0, *(stop for _, stop in filled)]
    assert [start for start, _ in filled] == edges[:-1] and edges[-1] == numel, f"{name}: {intervals}"


@pytest.mark.parametrize("ranks", RANKS)
def test_fsdp2_tiles_every_parameter(ranks: str, request: pytest.FixtureRequest) -> None:
    results = [got["fsdp2"] for got in request.getfixturevalue(ranks)]
    trained = {name: p.numel() for name, p in Partly().named_parameters() if p.requires_grad}
    for got in results:
        assert got["right"], "an interval holds other elements than it says"
        assert got["replicated"] == ["loose"] and set(got["intervals"]) == set(trained)
    for name, numel in trained.items():
        intervals = [got["intervals"][name] for got in results]
        if name == "loose":
            assert intervals == [[0, numel]] * len(results)
        else:
            assert_tiles(name, numel, intervals)
    empty = [name for name in trained if any(a == b for a, b in (got["intervals"][name] for got in results))]
    assert "body.blocks.0.gain" in empty


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_left_whole_counts_once(ranks: str, request: pytest.FixtureRequest) -> None:
    for got in request.getfixturevalue(ranks):
        assert got["fsdp2"]["grad_norm"] == pytest.approx(got["fsdp2"]["norm"], rel=1e-6)


@pytest.mark.parametrize("groups", ["one", "many"])
def test_zero3_views_are_deepspeeds_shards(three: list[dict[str, Any]], groups: str) -> None:
    """The private lists that the backend reads, against safe_get_local_grad and safe_get_local_fp32_param."""
    results = [got["zero3"][groups] for got in three]
    assert all(got["equal"] for got in results)
    assert (results[0]["sub_groups"] > 2) == (groups == "many")
    for name, parameter in make_toy().named_parameters():
        if not parameter.requires_grad:
            continue
        sizes = [got["sizes"][name] for got in results]
        assert_tiles(name, parameter.numel(), [size[:2] for size in sizes])
        partition = math.ceil(parameter.numel() / 3)
        assert [size[2] for size in sizes] == [partition] * 3, (
            "DeepSpeed pads to one size; only real elements are viewed"
        )
    assert any(size[1] - size[0] < size[2] for got in results for size in got["sizes"].values())
    assert torch.tensor([got["norm"] for got in results]).unique().numel() == 1


ZERO12 = ["1", "2", "2 aligned", "2 round robin", "2 bfloat16, float32 sums", "1 bfloat16, float32 sums"]


@pytest.mark.parametrize("case", ZERO12)
def test_zero12_views_are_deepspeeds_fragments(three: list[dict[str, Any]], case: str) -> None:
    """The private lists that the backend reads, against safe_get_full_grad and safe_get_full_fp32_param."""
    results = [got["zero12"][case] for got in three]
    layers = {name: p.numel() for name, p in Scaled().named_parameters() if p.requires_grad}
    for name, numel in layers.items():
        assert_tiles(name, numel, [got["intervals"][name] for got in results])
    for got in results:
        # Every layer at the first group's step, and the second group's at its own (BF16_Optimizer steps all at once).
        assert got["seen"] > len(layers) or (case == ZERO12[-1] and got["seen"] == len(layers))
        assert got["equal"] == {"grad": True, "weight": True}
        assert got["norm"] == got["engine"] > 0
    cut = [name for name in layers if sum(a < b for a, b in (got["intervals"][name] for got in results)) > 1]
    whole = [name for name in layers if layers[name] in [b - a for a, b in (got["intervals"][name] for got in results)]]
    assert cut and whole, "parameters on several ranks, and on one alone"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shard 1", "weight: placement (Shard(dim=1),) is not supported; expected one Shard(0)"),
        ("tensor parallel", "weight: placement (_StridedShard("),
        ("meshes of two kinds", "shard the whole model on one mesh"),
        ("fsdp1", "FSDP1 (FullyShardedDataParallel) is not supported; shard with torch.distributed.fsdp.fully_shard"),
        (
            "half precision at stage 0",
            "DeepSpeed ZeRO stage 0: half precision without ZeRO is not supported; set zero_optimization.stage to 1",
        ),
        ("optimizer before sharding", "tensors that are no parameters of the model"),
        ("sharded mapping", "reference: embed.weight is sharded; pass full tensors, or reference='initial'"),
        ("two clips", "max_grad_norm=0.5: the engine clips to 1.0 already"),
    ],
)
def test_refused(two: list[dict[str, Any]], case: str, message: str) -> None:
    for got in two:
        assert message in got["refusals"][case] and "\n" not in got["refusals"][case]


def test_names_under_compiled_ddp(two: list[dict[str, Any]]) -> None:
    names = [name for name, p in make_toy().named_parameters() if p.requires_grad]
    for got in two:
        assert got["compiled"] == [*names, "ddp"]
