"""A loader goes on from its state: nothing lost, nothing repeated, nothing replayed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.data.loader import TrainingLoader, build_training_loader
from digrap_scale.data.manifest import index_shards
from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.data.sources import Source
from digrap_scale.errors import CheckpointError, ConfigError
from tests.data.samples import NumberTask, make_samples, raw_tar, sample_members

SAMPLES = 101


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Uneven: 40, 40 and 21 samples."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(make_samples(SAMPLES), folder, prefix="p", samples_per_shard=40)
    return ShardSet.open([f"{folder}/p-*.tar"])


def build(shards: Any, rank: int = 0, world_size: int = 1, workers: int = 0, **changes: Any) -> TrainingLoader:
    options = {"batch_samples": 4, "seed": 5, "shuffle_buffer_samples": 16, **changes}
    return build_training_loader(shards, NumberTask(), rank=rank, world_size=world_size, workers=workers, **options)


def take(loader: TrainingLoader, batches: int | None = None) -> list[list[int]]:
    """The numbers of the next batches; by default of the rest of the epoch that the loader is in."""
    return [batch.labels.tolist() for batch in islice(loader, batches)] if batches is not None else list(rest(loader))


def rest(loader: TrainingLoader) -> Iterator[list[int]]:
    epoch, stream = loader.state_dict()["epoch"], iter(loader)
    while loader.state_dict()["epoch"] == epoch:
        batch = next(stream)
        assert batch.labels is not None
        yield batch.labels.tolist()


def flat(batches: list[list[int]]) -> list[int]:
    """Their samples; batches of padding have none."""
    return [number for batch in batches for number in batch if number >= 0]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_goes_on_as_if_nothing_had_been(shards: ShardSet, world_size: int, workers: int) -> None:
    """Killed in mid-epoch with batches prefetched; then another number of workers makes the same batches."""
    states = []
    for rank in range(world_size):
        whole = take(build(shards, rank, world_size), 2 * (SAMPLES // (4 * world_size)))
        before = build(shards, rank, world_size, workers)
        head = take(before, 5)
        states.append(json.loads(json.dumps(before.state_dict())))
        after = build(shards, rank, world_size, (workers + 2) % 4)
        after.load_state_dict(states[-1])
        assert head + take(after, len(whole) - 5) == whole
    assert all(state == states[0] for state in states)
    assert len(json.dumps(states[0])) < 300


@pytest.mark.parametrize(
    ("before", "after", "order", "workers"),
    [
        (3, 2, "local", 0),
        (1, 3, "local", 0),
        (2, 1, "local", 3),
        (3, 2, "global", 1),
        (1, 3, "global", 0),
        (2, 1, "global", 0),
    ],
)
def test_another_world_size_takes_what_is_left(
    shards: ShardSet, before: int, after: int, order: str, workers: int
) -> None:
    """Samples of the epoch that were not handed out come, each once; then epochs are whole again."""
    options: dict[str, Any] = {"order": order, "remainder": "pad", "workers": workers}
    head, state = [], {}
    for rank in range(before):
        loader = build(shards, rank, before, **options)
        head += flat(take(loader, 4))
        state = loader.state_dict()
    tail, following = [], []
    for rank in range(after):
        loader = build(shards, rank, after, batch_samples=3, **options)
        loader.load_state_dict(state)
        tail += flat(take(loader))
        following += flat(take(loader))
        assert loader.state_dict()["lanes"] == (after if order == "local" else 1)
    assert len(head) == 16 * before
    assert Counter(head + tail) == Counter(range(SAMPLES))
    assert Counter(following) == Counter(range(SAMPLES))


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    worlds=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)), min_size=2, max_size=4),
    remainder=st.sampled_from(["pad", "repeat"]),
    order=st.sampled_from(["local", "global"]),
    window=st.integers(0, 12),
)
def test_any_shards_world_sizes_and_kills(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    worlds: list[tuple[int, int, int]],
    remainder: str,
    order: str,
    window: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    first = 0
    for shard, count in enumerate(counts):
        members = [m for i in range(first, first + count) for m in sample_members(f"{i}", {"number": i})]
        raw_tar(folder / f"{shard}.tar", members)
        first += count
    shards = ShardSet.open([f"{folder}/*.tar"])
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for world_size, batch_samples, batches in [*worlds, (2, 2, 1000)]:
        at_end = []
        for rank in range(world_size):
            options = {"remainder": remainder, "order": order, "shuffle_buffer_samples": window}
            loader = build(shards, rank, world_size, batch_samples=batch_samples, **options)
            if state is not None:
                loader.load_state_dict(state)
            if loader.state_dict()["epoch"] == 0:
                seen += flat(list(islice(rest(loader), batches)))
            at_end.append(loader.state_dict())
        assert all(one == at_end[0] for one in at_end)
        state = at_end[0]
    counted = Counter(seen)
    assert set(counted) == set(range(first))
    if remainder == "pad":
        assert set(counted.values()) == {1}


def test_a_global_order_is_the_same_for_any_world_size(shards: ShardSet) -> None:
    """Steps of 12 samples: the same samples in each, over one, two or three ranks, with any workers."""
    runs = []
    for world_size, workers in ((1, 0), (2, 3), (3, 1)):
        options = {"order": "global", "batch_samples": 12 // world_size, "workers": workers}
        ranks = [take(build(shards, rank, world_size, **options), 16) for rank in range(world_size)]
        runs.append([flat([ranks[rank][i] for rank in range(world_size)]) for i in range(16)])
    assert runs[0] == runs[1] == runs[2]
    local = take(build(shards, 0, 1, batch_samples=12), 16)
    assert local == runs[0]  # one rank has one lane either way


def test_batches_by_length_resume_and_are_global(tmp_path: Path) -> None:
    samples = make_samples(96)
    for number, sample in enumerate(samples):
        sample["meta"]["caption"] = "x" * (number * 37 % 96)
    write_shards(samples, tmp_path, prefix="p", samples_per_shard=40)
    shards = ShardSet.open([f"{tmp_path}/p-*.tar"])
    options: dict[str, Any] = {"shuffle_buffer_samples": 48, "bucket_by_length": True}
    whole = take(build(shards, **options), 48)
    assert sorted(flat(whole[:24])) == list(range(96))
    spread = [max(sizes) - min(sizes) for batch in whole if (sizes := [number * 37 % 96 for number in batch])]
    assert sum(spread) / len(spread) < 15  # 4 of 96 lengths: 58 by chance
    before = build(shards, workers=1, **options)
    assert take(before, 7) == whole[:7]
    after = build(shards, **options)
    after.load_state_dict(before.state_dict())
    assert take(after, 41) == whole[7:]
    ranks = [take(build(shards, rank, 2, batch_samples=6, order="global", **options), 8) for rank in range(2)]
    one = take(build(shards, batch_samples=12, order="global", **options), 8)
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    with pytest.raises(CheckpointError, match="data.bucket_by_length"):
        build(shards, shuffle_buffer_samples=48).load_state_dict(before.state_dict())


def test_steps_of_several_batches_end_epochs_together(shards: ShardSet) -> None:
    """101 samples, 2 ranks × 3 micro-batches × 4 = 24 a step: 4 steps, 5 samples are dropped."""
    seen = []
    for rank in range(2):
        loader = build(shards, rank, 2, accumulation_steps=3)
        assert len(loader) == 12
        epoch = take(loader)
        assert len(epoch) == 12
        seen += flat(epoch)
    assert len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_resumes_and_counts_its_sources(tmp_path: Path, workers: int) -> None:
    """a is small and comes again and again, each pass complete; b is larger."""
    for name, count, start in (("a", 10, 0), ("b", 300, 1000)):
        write_shards(make_samples(count, start), tmp_path, prefix=name, samples_per_shard=7)
    sources = [Source(n, ShardSet.open([f"{tmp_path}/{n}-*.tar"]), w) for n, w in (("a", 1.0), ("b", 3.0))]
    whole = [take(build(sources, rank, 2, order="global"), 120) for rank in range(2)]
    stream = [n for pair in zip(*whole, strict=True) for batch in pair for n in batch]
    of_a = [n for n in stream if n < 1000]
    assert abs(len(of_a) / len(stream) - 0.25) < 0.05
    for start in range(0, len(of_a) // 10 * 10, 10):
        assert sorted(of_a[start : start + 10]) == list(range(10))
    assert len({n for n in stream if n >= 1000}) == 300

    state: dict[str, Any] = {}
    for rank in range(2):
        loader = build(sources, rank, 2, workers, order="global")
        assert take(loader, 50) == whole[rank][:50]
        state = loader.state_dict()
    assert loader.source_samples() == {
        "a": sum(n < 1000 for n in stream[:400]),
        "b": sum(n >= 1000 for n in stream[:400]),
    }
    resumed = build(sources, 0, 1, workers, order="global")
    resumed.load_state_dict(state)
    assert flat(take(resumed, 100)) == stream[400:800]


def test_a_state_of_other_data_or_another_order_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    state = build(shards).state_dict()
    write_shards(make_samples(SAMPLES - 1), tmp_path, prefix="p", samples_per_shard=40)
    other = ShardSet.open([f"{tmp_path}/p-*.tar"])
    cases: list[tuple[TrainingLoader, dict[str, Any], str]] = [
        (build(other), state, "training shards: the checkpoint was saved with '101 samples"),
        (build(shards, seed=6), state, "run.seed: the checkpoint was saved with 5, found 6"),
        (build(shards, shuffle_buffer_samples=8), state, "data.shuffle_buffer_samples: .* 16, found 8"),
        (build(shards), {**state, "position": -1}, "expected epoch, position"),
        (build(shards), {**state, "lanes": "x"}, "expected epoch, position"),
        (build(shards), {**state, "version": 9}, "version 9"),
        (build(shards), {}, "version None"),
    ]
    for loader, bad, message in cases:
        with pytest.raises(CheckpointError, match=message):
            loader.load_state_dict(bad)


@pytest.fixture
def damaged(tmp_path: Path) -> ShardSet:
    """20 samples, of which 4, 5, 6, 7 and 13 cannot be decoded."""
    broken = {4, 5, 6, 7, 13}
    members = [m for i in range(20) for m in sample_members(f"k{i}", {"number": i}, b"x" if i in broken else None)]
    raw_tar(tmp_path / "x.tar", members)
    return ShardSet.open([f"{tmp_path}/x.tar"], skip=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_counted(
    damaged: ShardSet, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = build(damaged, workers=workers, batch_samples=2, on_bad_sample="skip")
    seen = flat(take(loader))
    assert sorted(seen) == [i for i in range(20) if i not in {4, 5, 6, 7, 13}]
    assert loader.bad_samples == 5
    assert sum("x.tar: sample k13: the image cannot be decoded" in line for line in caplog.messages) == 1


def test_a_batch_of_bad_samples_alone_is_padding(damaged: ShardSet) -> None:
    batches = list(islice(build(damaged, batch_samples=1, on_bad_sample="skip"), 20))
    assert sum(batch.keys == [] and batch.labels.tolist() == [-1] for batch in batches) == 5


def test_bad_samples_have_a_cap(damaged: ShardSet) -> None:
    with pytest.raises(ConfigError, match="data.max_bad_samples: expected at most 4 .*x.tar: sample k"):
        take(build(damaged, on_bad_sample="skip", max_bad_samples=4))
    with pytest.raises(ConfigError, match="x.tar: sample k.* cannot be decoded"):
        take(build(damaged))


def test_bad_samples_go_on_after_a_resume(damaged: ShardSet) -> None:
    """Their sum, over any number of ranks, and the cap."""
    before = build(damaged, on_bad_sample="skip", batch_samples=2)
    take(before)
    state = json.loads(json.dumps(before.state_dict()))
    assert state["bad_samples"] == 5
    for ranks in (1, 2, 3):
        loaders = [build(damaged, rank, ranks, on_bad_sample="skip", batch_samples=2) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        assert sum(loader.bad_samples for loader in loaders) == 5
        states = [loader.state_dict(bad_samples=5) for loader in loaders]
        assert states == states[:1] * ranks and states[0]["bad_samples"] == 5, "one rank's state is enough"
    capped = build(damaged, on_bad_sample="skip", max_bad_samples=6, batch_samples=2)
    capped.load_state_dict(state)
    with pytest.raises(ConfigError, match="data.max_bad_samples: expected at most 6"):
        take(capped)
    old = {key: value for key, value in state.items() if key != "bad_samples"}
    capped.load_state_dict(old)
    assert capped.bad_samples == 0
    with pytest.raises(CheckpointError, match="expected bad_samples of 0 or more, found 'x'"):
        capped.load_state_dict({**state, "bad_samples": "x"})


def test_what_the_scan_leaves_out_counts_too(tmp_path: Path) -> None:
    """Once, on rank 0, and the cap is for it as well."""
    members = [m for i in range(8) for m in sample_members(f"k{i}", {"number": i})]
    members.insert(6, ("k3.pth", b"x"))
    path = raw_tar(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:-10240])
    shards = ShardSet.open([str(path)], skip=True)
    assert len(shards.skipped) == 2
    loaders = [build(shards, rank, 2, on_bad_sample="skip", batch_samples=2) for rank in range(2)]
    assert [loader.bad_samples for loader in loaders] == [2, 0]
    for loader in loaders:
        loader.load_state_dict(loaders[0].state_dict(bad_samples=2))
    assert sum(loader.bad_samples for loader in loaders) == 2
    with pytest.raises(ConfigError, match="data.max_bad_samples: expected at most 1 .*x.tar: "):
        build(shards, on_bad_sample="skip", max_bad_samples=1)


def test_shards_made_anew_are_other_shards(tmp_path: Path) -> None:
    """Of the same names and counts; without manifests nothing tells them apart."""

    def made(number: int, manifest: bool = True) -> ShardSet:
        raw_tar(tmp_path / "x-0.tar", [m for i in range(4) for m in sample_members(f"k{i}", {"number": i + number})])
        (tmp_path / "x.manifest.json").unlink(missing_ok=True)
        if manifest:
            index_shards([tmp_path / "x-0.tar"], "x")
        return ShardSet.open([f"{tmp_path}/x-*.tar"])

    state = build(made(0)).state_dict()
    build(made(0)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="data state: content of the training shards: the checkpoint was saved"):
        build(made(1)).load_state_dict(state)
    build(made(1, manifest=False)).load_state_dict(state)
    build(made(1)).load_state_dict({key: value for key, value in state.items() if key != "content"})


def test_samples_that_the_task_refuses_are_skipped_too(tmp_path: Path) -> None:
    metas = [{"number": i} if i != 3 else {"label": "no number"} for i in range(8)]

    class Strict(NumberTask):
        def collate(self, samples: list[dict[str, Any]]) -> Any:
            for sample in samples:
                if "number" not in sample["meta"]:
                    raise ConfigError(f"{sample['shard']}: sample {sample['key']}: no number")
            return super().collate(samples)

    raw_tar(tmp_path / "x.tar", [m for i, meta in enumerate(metas) for m in sample_members(f"k{i}", meta)])
    shards = ShardSet.open([f"{tmp_path}/x.tar"])
    options: dict[str, Any] = {"batch_samples": 4, "rank": 0, "world_size": 1, "workers": 0, "seed": 0}
    loader = build_training_loader(shards, Strict(), **options, on_bad_sample="skip")
    assert sorted(flat(take(loader))) == [0, 1, 2, 4, 5, 6, 7] and loader.bad_samples == 1
    with pytest.raises(ConfigError, match="sample k3: no number"):
        take(build_training_loader(shards, Strict(), **options))
