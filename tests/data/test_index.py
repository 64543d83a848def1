"""``digrap-scale index``."""

from __future__ import annotations

from pathlib import Path

import pytest

from digrap_scale.cli import main
from digrap_scale.data.shards import ShardSet, write_shards
from tests.data.samples import make_samples, raw_tar, sample_members


def test_index_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        raw_tar(tmp_path / f"cc-{i:05d}.tar", [m for j in range(4) for m in sample_members(f"{i}/{j}")])
    shards = f"{tmp_path}/cc-{{00000..00002}}.tar"
    assert main(["index", shards, "--check"]) == 2
    assert capsys.readouterr().err.count("no manifest lists it") == 3
    assert main(["index", shards, "--processes", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cc.manifest.json: 12 samples in 3 shards\n"
    assert main(["index", shards, "--check"]) == 0
    assert "as listed" in capsys.readouterr().out
    path = tmp_path / "cc-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["index", shards, "--check"]) == 2
    assert f"{path}: expected 10240 bytes, found 10239" in capsys.readouterr().err


def test_broken_shards_are_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = raw_tar(tmp_path / "a.tar", [m for j in (0, 1, 0) for m in sample_members(str(j))])
    assert main(["index", str(path)]) == 2
    assert f"{path}: sample 0 comes again at byte 4096" in capsys.readouterr().err
    assert main(["index", str(path), "--skip-bad"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"left out: {path}: sample 0") and second.endswith("a.manifest.json: 2 samples in 1 shards")
    assert ShardSet.open([str(path)]).counts == (2,)


def test_one_file_has_one_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(make_samples(3), tmp_path, prefix="p", samples_per_shard=2)
    assert main(["index", f"{tmp_path}/p-*.tar", "--name", "other"]) == 2
    assert "p.manifest.json: lists p-000000.tar already; give --name p" in capsys.readouterr().err
    (tmp_path / "sub").mkdir()
    raw_tar(tmp_path / "sub" / "q.tar", sample_members("k"))
    assert main(["index", f"{tmp_path}/p-000000.tar", f"{tmp_path}/sub/q.tar", "--name", "p"]) == 2
    assert "expected files of one folder" in capsys.readouterr().err
