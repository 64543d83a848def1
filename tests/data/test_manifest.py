"""Manifests: written last, checked against every byte."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from digrap_scale.data import manifest as manifests
from digrap_scale.data.manifest import Manifest, check_manifest, index_shards, set_name
from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet, expand_shards, write_shards
from digrap_scale.data.splitting import Span
from digrap_scale.data.tar import ShardReader, scan_shard
from digrap_scale.errors import ConfigError, SaveError
from tests.data.samples import make_samples, raw_tar, sample_members


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(make_samples(7), tmp_path, prefix="train", samples_per_shard=3)
    return tmp_path


def test_an_index_of_foreign_shards_is_that_of_the_writer(folder: Path) -> None:
    written = {name: (folder / name).read_bytes() for name in ("train.manifest.json", "train.offsets.npy")}
    for name in written:
        (folder / name).unlink()
    manifest, skipped = index_shards(expand_shards([f"{folder}/train-*.tar"]), "train", processes=2)
    assert skipped == [] and manifest.samples == 7
    assert {name: (folder / name).read_bytes() for name in written} == written


def test_offsets_are_read_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard is walked through where a manifest tells where its samples are."""
    expected = [scan_shard(folder / f"train-00000{i}.tar").offsets for i in range(3)]
    monkeypatch.setattr("digrap_scale.data.tar.scan_shard", lambda path: pytest.fail(f"{path} was walked through"))
    shards = ShardSet.open([f"{folder}/train-*.tar"])
    for offsets, rows in zip(shards.offsets, expected, strict=True):
        assert offsets is not None and np.array_equal(offsets(), rows)
    part = ShardSet.open([f"{folder}/train-000002.tar"])
    assert part.offsets[0] is not None and np.array_equal(part.offsets[0](), expected[2])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_offsets_are_mapped_once_for_all_shards(folder: Path) -> None:
    """Not once a shard: a set may have thousands."""
    shards = ShardSet.open([f"{folder}/*.tar"])
    with closing(ShardReader(shards.paths, shards.offsets)) as reader:
        for shard in range(len(shards.paths)):
            reader.read(shard, 0)
        assert len(shards.paths) > 1
        assert Path("/proc/self/maps").read_text().count(f"{folder}/") == 1


def test_a_check_reads_every_byte(folder: Path) -> None:
    path = folder / "train.manifest.json"
    assert check_manifest(path) == []
    shard = folder / "train-000001.tar"
    whole = bytearray(shard.read_bytes())
    whole[700] ^= 1
    shard.write_bytes(whole)
    (folder / "train-000002.tar").unlink()
    offsets = np.load(folder / "train.offsets.npy")
    offsets[0, 0] += 1
    np.save(folder / "train.offsets.npy", offsets)
    first, second, third = check_manifest(path, processes=2)
    assert first.startswith(f"{shard}: expected sha256 ")
    assert second == f"{folder}/train-000002.tar: missing"
    assert third.startswith(f"{folder}/train.offsets.npy: expected sha256")
    (folder / "train-000000.tar").write_bytes(b"x")
    assert (
        f"{folder}/train-000000.tar: expected {Manifest.read(path).shards[0].bytes} bytes, found 1"
        in check_manifest(path)
    )


def test_a_wrong_count_is_found(folder: Path) -> None:
    path = folder / "train.manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"][1]["samples"] = 4
    path.write_text(json.dumps(raw))
    assert check_manifest(path) == [f"{folder}/train-000001.tar: expected 4 samples, found 3"]


@pytest.mark.parametrize("counts", [(2, 3, 1), (3, 2, 2), (4, 2, 1), (2, 4, 1), (3, 3, 2)])
def test_a_wrong_count_is_found_by_who_reads_samples(folder: Path, counts: tuple[int, ...]) -> None:
    """Else one sample would come twice, and another never."""
    path = folder / "train.manifest.json"
    raw = json.loads(path.read_text())
    assert [entry["samples"] for entry in raw["shards"]] == [3, 3, 1]
    for entry, count in zip(raw["shards"], counts, strict=True):
        entry["samples"] = count
    path.write_text(json.dumps(raw))
    shards = ShardSet.open([f"{folder}/train-*.tar"])
    spans = [Span(i, 0, count) for i, count in enumerate(shards.counts)]
    with pytest.raises(
        ConfigError, match=r"train\.offsets\.npy: (expected \d × 3 uint64 by|rows \d to \d are not places)"
    ):
        list(samples_of(spans, shards.paths, shards.offsets))


def test_broken_shards_all_come_out_at_once_or_are_skipped(tmp_path: Path) -> None:
    good = sample_members("good")
    raw_tar(tmp_path / "x-0.tar", good)
    raw_tar(tmp_path / "x-1.tar", [*good, *sample_members("b"), *good])
    raw_tar(tmp_path / "x-2.tar", [*good, ("a.pth", b"x")])
    (tmp_path / "x-3.tar").write_bytes(b"no tar" * 200)
    paths = expand_shards([f"{tmp_path}/x-*.tar"])
    with pytest.raises(ConfigError) as error:
        index_shards(paths, "x")
    assert [Path(p.split(":")[0]).name for p in error.value.problems] == ["x-1.tar", "x-2.tar", "x-3.tar"]
    assert not list(tmp_path.glob("*.json"))
    manifest, skipped = index_shards(paths[:3], "x", skip=True)
    assert manifest.samples == 4 and len(skipped) == 2
    assert check_manifest(tmp_path / "x.manifest.json") == []


def test_the_manifest_comes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses the offsets leaves no manifest, and nothing half-written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests.np, "save", full)
    with pytest.raises(SaveError, match=r"train\.manifest\.json: cannot be written: .*No space left"):
        index_shards(expand_shards([f"{folder}/train-*.tar"]), "train")
    assert not list(folder.glob("*.json")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["../x.tar", "a/b.tar", "..", ""])
def test_files_of_other_folders_are_no_entries(folder: Path, name: str) -> None:
    path = folder / "train.manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"][0]["file"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="not a shard manifest"):
        Manifest.read(path)


def test_offsets_that_are_missing_or_no_array_of_places_are_named(folder: Path) -> None:
    shards = ShardSet.open([f"{folder}/train-*.tar"])
    path = folder / "train.offsets.npy"
    for write in (
        lambda: np.save(path, np.zeros((3, 3), np.uint64)),
        lambda: np.save(path, np.zeros((7, 2), np.uint64)),
        lambda: np.save(path, np.array([{}] * 7, dtype=object), allow_pickle=True),
        lambda: path.write_bytes(b""),
        path.unlink,
    ):
        write()
        with pytest.raises(ConfigError, match=r"train\.offsets\.npy: .*digrap-scale index"):
            assert shards.offsets[2] is not None
            shards.offsets[2]()


def test_sets_take_their_files_name() -> None:
    assert set_name([Path("a/train-000000.tar"), Path("a/train-000001.tar")]) == "train"
    assert set_name([Path("a/cc3m_00012.tar")]) == "cc3m"
    assert set_name([Path("000.tar"), Path("001.tar")]) == "shards"


def test_version_1_without_offsets_is_read(folder: Path) -> None:
    path = folder / "train.manifest.json"
    raw = json.loads(path.read_text())
    del raw["offsets"]
    path.write_text(json.dumps({**raw, "version": 1}))
    shards = ShardSet.open([f"{folder}/train-*.tar"])
    assert shards.counts == (3, 3, 1) and shards.offsets == (None,) * 3
