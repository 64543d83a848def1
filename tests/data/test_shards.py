"""Writing, naming and counting shards."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import Manifest, ShardSet, expand_shards, write_shards
from digrap_scale.data.splitting import Span
from digrap_scale.errors import ConfigError, SaveError
from tests.data.samples import encoded, make_samples, raw_tar


def test_round_trip_keeps_every_sample(tmp_path: Path) -> None:
    written = make_samples(7)
    manifest = write_shards(written, tmp_path, prefix="train", samples_per_shard=3)
    assert [entry.samples for entry in manifest.shards] == [3, 3, 1]
    shards = ShardSet.open([f"{tmp_path}/train-*.tar"])
    assert shards.counts == (3, 3, 1)
    read = list(samples_of([Span(i, 0, n) for i, n in enumerate(shards.counts)], shards.paths, shards.offsets))
    assert [sample["key"] for sample in read] == [sample["key"] for sample in written]
    assert [sample["meta"] for sample in read] == [sample["meta"] for sample in written]
    assert [sample["image"].getpixel((0, 0)) for sample in read] == [(i, 0, 0) for i in range(7)]


def test_manifest_describes_the_files_and_nothing_is_left_beside(tmp_path: Path) -> None:
    manifest = write_shards(make_samples(5), tmp_path, prefix="train", samples_per_shard=2)
    for entry in manifest.shards:
        data = (tmp_path / entry.file).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert Manifest.read(tmp_path / "train.manifest.json") == manifest
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "train.manifest.json",
        "train.offsets.npy",
    ]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    samples = make_samples(4)
    reordered = [{**sample, "meta": dict(reversed(sample["meta"].items()))} for sample in samples]
    first = write_shards(samples, tmp_path / "a", prefix="p", samples_per_shard=3)
    second = write_shards(reordered, tmp_path / "b", prefix="p", samples_per_shard=3)
    assert first == second


def test_rewriting_replaces_the_whole_set(tmp_path: Path) -> None:
    write_shards(make_samples(6), tmp_path, prefix="p", samples_per_shard=1)
    write_shards(make_samples(2), tmp_path, prefix="other", samples_per_shard=1)
    write_shards(make_samples(3), tmp_path, prefix="p", samples_per_shard=2)
    assert ShardSet.open([f"{tmp_path}/p-*.tar"]).counts == (2, 1)
    assert ShardSet.open([f"{tmp_path}/other-*.tar"]).samples == 2


def test_failed_write_leaves_the_earlier_set(tmp_path: Path) -> None:
    before = write_shards(make_samples(3), tmp_path, prefix="p", samples_per_shard=2)
    bad = [*make_samples(1), {"key": "x", "image": b"", "extension": "png", "meta": {"a": float("nan")}}]
    with pytest.raises(ConfigError, match="sample 'x' cannot be written"):
        write_shards(bad, tmp_path, prefix="p", samples_per_shard=2)
    assert Manifest.read(tmp_path / "p.manifest.json") == before
    assert ShardSet.open([f"{tmp_path}/p-*.tar"]).samples == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/../b", " a", "a//b", "a\nb"])
def test_bad_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="sample key"):
        write_shards([{**make_samples(1)[0], "key": key}], tmp_path, prefix="p", samples_per_shard=2)


def test_repeated_key_no_samples_and_unknown_extension_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comes twice"):
        write_shards(make_samples(1) * 2, tmp_path, prefix="p", samples_per_shard=1)
    with pytest.raises(ConfigError, match="no samples"):
        write_shards([], tmp_path, prefix="p", samples_per_shard=1)
    with pytest.raises(ConfigError, match="extension 'pyd'"):
        write_shards([{**make_samples(1)[0], "extension": "pyd"}], tmp_path, prefix="p", samples_per_shard=1)


def test_unwritable_folder_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        write_shards(make_samples(1), tmp_path / "file", prefix="p", samples_per_shard=1)


def test_patterns_expand_in_order_without_repeats(tmp_path: Path) -> None:
    write_shards(make_samples(4), tmp_path, prefix="p", samples_per_shard=1)
    braces = expand_shards([f"{tmp_path}/p-{{000002..000003}}.tar", f"{tmp_path}/p-*.tar"])
    assert [path.name for path in braces] == [f"p-00000{i}.tar" for i in (2, 3, 0, 1)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/none-*.tar", "no file matches"),
        ("{folder}/p-{{000000..000009}}.tar", "p-000001.tar"),
        ("{folder}/*.json", "not a .tar file"),
        ("pipe:cat x", "only local files"),
        ("http://host/a.tar", "only local files"),
        ("file:///a.tar", "only local files"),
        ("{folder}/p-{{00", "braces are not balanced"),
    ],
)
def test_bad_patterns_are_named(tmp_path: Path, pattern: str, message: str) -> None:
    write_shards(make_samples(1), tmp_path, prefix="p", samples_per_shard=1)
    with pytest.raises(ConfigError) as error:
        expand_shards([pattern.format(folder=tmp_path)])
    assert message in str(error.value) and len(error.value.problems) == 1


def test_counts_without_a_manifest(tmp_path: Path) -> None:
    write_shards(make_samples(5), tmp_path, prefix="p", samples_per_shard=3)
    (tmp_path / "p.manifest.json").unlink()
    shards = ShardSet.open([f"{tmp_path}/p-*.tar"])
    assert shards.counts == (3, 2)
    read = samples_of([Span(1, 0, 2), Span(0, 2, 3)], shards.paths, shards.offsets)
    assert [sample["meta"]["number"] for sample in read] == [3, 4, 2]


def test_shards_that_differ_from_their_manifest_are_named_all_at_once(tmp_path: Path) -> None:
    manifest = write_shards(make_samples(9), tmp_path, prefix="p", samples_per_shard=3)
    for entry in manifest.shards[:2]:
        path = tmp_path / entry.file
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError) as error:
        ShardSet.open([f"{tmp_path}/p-*.tar"])
    assert [problem.split(": ")[0] for problem in error.value.problems] == [
        f"{tmp_path}/p-00000{i}.tar" for i in (0, 1)
    ]
    assert f"expected {manifest.shards[0].bytes} bytes by its manifest" in str(error.value)


def test_unreadable_manifest_and_tars_are_named(tmp_path: Path) -> None:
    write_shards(make_samples(1), tmp_path, prefix="p", samples_per_shard=1)
    (tmp_path / "p.manifest.json").write_text(json.dumps({"version": 7, "shards": []}))
    with pytest.raises(ConfigError, match="manifest version 7"):
        ShardSet.open([f"{tmp_path}/p-*.tar"])
    (tmp_path / "p.manifest.json").write_text("[")
    with pytest.raises(ConfigError, match="not a shard manifest"):
        ShardSet.open([f"{tmp_path}/p-*.tar"])
    (tmp_path / "p.manifest.json").unlink()
    whole = (tmp_path / "p-000000.tar").read_bytes()
    for content in (b"no tar at all" * 100, gzip.compress(whole), b""):
        (tmp_path / "p-000000.tar").write_bytes(content)
        with pytest.raises(ConfigError, match="p-000000.tar"):
            ShardSet.open([f"{tmp_path}/p-*.tar"])


def test_foreign_members_are_named(tmp_path: Path) -> None:
    for name in ("a.pyd", "a.pth", "a.cls.json", "README", "a.json.gz"):
        raw_tar(tmp_path / "x.tar", [(name, encoded())])
        with pytest.raises(ConfigError, match="x.tar: member"):
            ShardSet.open([f"{tmp_path}/x.tar"])
