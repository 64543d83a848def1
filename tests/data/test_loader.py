"""Loaders with real DataLoader workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.errors import ConfigError
from tests.data.processes import lives, status_of
from tests.data.samples import NumberTask, make_samples, open_loader, raw_tar, sample_members


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(make_samples(53), folder, prefix="p", samples_per_shard=20)
    return ShardSet.open([f"{folder}/p-*.tar"])


def loader(shards: ShardSet, train: bool, rank: int = 0, **changes: Any) -> Any:
    options = {"batch_samples": 4, "world_size": 3, "workers": 0, "seed": 5, "shuffle_buffer_samples": 8, **changes}
    return open_loader(shards, NumberTask(), train, rank=rank, **options)


def numbers(batches: list) -> list[int]:
    return [int(n) for batch in batches for n in batch.labels]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_epochs_are_exact(shards: ShardSet, workers: int) -> None:
    per_epoch = 53 // 12
    epochs: list[list[int]] = [[], [], []]
    for rank in range(3):
        loaded = loader(shards, True, rank, workers=workers)
        assert len(loaded) == per_epoch
        batches = list(islice(loaded, 3 * per_epoch))
        assert all(batch.labels.shape == (4,) for batch in batches)
        for epoch in range(3):
            epochs[epoch] += numbers(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
    for seen in epochs:
        assert len(seen) == 48 and max(Counter(seen).values()) == 1
    assert epochs[0] != epochs[1]
    # not in the order of the shards
    assert sum(b == a + 1 for a, b in zip(epochs[0], epochs[0][1:], strict=False)) < 24


def test_workers_heed_the_rank_alone(shards: ShardSet) -> None:
    """torchrun sends SIGTERM to all processes of a rank, which still takes steps, and saves; then it may end them."""
    others = set(multiprocessing.active_children())
    batches = iter(loader(shards, True, workers=1))
    first = list(islice(batches, 2))
    (worker,) = set(multiprocessing.active_children()) - others
    for _ in range(2):
        subprocess.run(["kill", str(worker.pid)], check=True)
    assert numbers(first + list(islice(batches, 9))) == numbers(list(islice(loader(shards, True), 11)))
    assert worker.is_alive()
    until = time.monotonic() + 20  # a signal that comes while another one is pending is merged into it
    while int(status_of(worker.pid, "ShdPnd"), 16) >> (signal.SIGTERM - 1) & 1 and time.monotonic() < until:
        time.sleep(0.01)
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_order_depends_on_the_seed_alone(shards: ShardSet, workers: int) -> None:
    first, again, other = (list(islice(loader(shards, True, 1, workers=workers, seed=seed), 9)) for seed in (5, 5, 6))
    assert numbers(first) == numbers(again) != numbers(other)
    assert all(torch.equal(a.inputs["seeds"], b.inputs["seeds"]) for a, b in zip(first, again, strict=True))


def test_augmentation_seeds_differ_between_epochs(shards: ShardSet) -> None:
    batches = list(islice(loader(shards, True, world_size=1, batch_samples=53), 2))
    by_number = [dict(zip(b.labels.tolist(), b.inputs["seeds"].tolist(), strict=True)) for b in batches]
    assert set(by_number[0]) == set(by_number[1]) == set(range(53))
    assert all(by_number[0][n] != by_number[1][n] for n in range(53))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("world_size", "batch_samples"), [(1, 8), (3, 6), (4, 13), (7, 2)])
def test_evaluation_is_exact_and_ordered(shards: ShardSet, workers: int, world_size: int, batch_samples: int) -> None:
    seen: list[int] = []
    lengths = set()
    for rank in range(world_size):
        loaded = loader(shards, False, rank, workers=workers, world_size=world_size, batch_samples=batch_samples)
        batches = list(loaded)
        assert len(batches) == len(loaded)
        lengths.add(len(batches))
        seen += [n for n in numbers(batches) if n >= 0]
    assert len(lengths) == 1
    assert seen == list(range(53))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_samples_yields_padding(tmp_path: Path, workers: int) -> None:
    write_shards(make_samples(2), tmp_path, prefix="p", samples_per_shard=1)
    shards = ShardSet.open([f"{tmp_path}/p-*.tar"])
    seen = []
    for rank in range(5):
        (batch,) = loader(shards, False, rank, world_size=5, workers=workers)
        assert batch.labels.shape == (1,)
        assert (batch.labels.item() == -1) == (batch.keys == [])
        seen += batch.keys
    assert seen == ["s000000", "s000001"]


def test_too_little_data_is_an_error(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="hold 53 samples"):
        loader(shards, True, world_size=10, batch_samples=6)


def test_workers_leave_the_global_generator_alone(shards: ShardSet) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(islice(loader(shards, True, workers=2), 3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_ends_the_loader_with_one_line(tmp_path: Path, workers: int) -> None:
    members = [m for i in range(6) for m in sample_members(f"k{i}", {"number": i}, b"broken" if i == 4 else None)]
    raw_tar(tmp_path / "x.tar", members)
    with pytest.raises(ConfigError) as error:
        list(loader(ShardSet.open([f"{tmp_path}/x.tar"]), False, world_size=1, workers=workers))
    assert len(str(error.value).splitlines()) == 1
    assert "x.tar: sample k4: the image cannot be decoded" in str(error.value)


def test_crops_do_not_depend_on_the_folder(shards: ShardSet, tmp_path: Path) -> None:
    """The same shards copied elsewhere: the same samples, with the same augmentation seeds."""
    for path in shards.paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = ShardSet.open([f"{tmp_path}/p-*.tar"])
    here, there = ([batch.inputs["seeds"].tolist() for batch in islice(loader(one, True), 5)] for one in (shards, copy))
    assert here == there


def test_workers_start_by_fork_whatever_the_default(shards: ShardSet) -> None:
    """Python 3.14's default starts a process between, which lets SIGTERM through."""
    before, others = multiprocessing.get_start_method(), set(multiprocessing.active_children())
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        batches = iter(loader(shards, True, workers=1))
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert int(status_of(worker.pid, "PPid")) == os.getpid()
    # of its main thread; that which waits for the signal shows it as open
    blocked = int(status_of(worker.pid, "SigBlk"), 16)
    assert blocked >> (signal.SIGTERM - 1) & 1


def test_workers_end_with_a_rank_that_left_at_once() -> None:
    """It has told them nothing, and their last batches fill a pipe that nobody reads: torch's own workers would stay."""
    run = subprocess.run([sys.executable, "-c", LEAVES_AT_ONCE], capture_output=True, text=True, timeout=60)
    workers = [int(word) for word in run.stdout.split()]
    assert run.returncode == 9 and len(workers) == 2, run.stderr
    until = time.monotonic() + 20
    while any(map(lives, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(lives, workers))


LEAVES_AT_ONCE = """
import itertools, multiprocessing, os, time
from digrap_scale.data.workers import Delivery, Workers

class Large:
    def __getitem__(self, number):
        return Delivery(None, [100 * "x" + str(i) for i in range(2000)])

batches = Workers(2).run(Large(), range(10**6), 0)
list(itertools.islice(batches, 2))
time.sleep(0.5)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
os._exit(9)
"""
