"""Walking through tar files: what is wrong with one is told by name, what is right is found again by number."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from digrap_scale.data import tar
from digrap_scale.data.tar import SampleError, ShardReader, scan_checked, scan_shard
from digrap_scale.errors import ConfigError
from tests.data.samples import encoded, raw_tar, sample_members

BLOCK = tarfile.BLOCKSIZE


def three(folder: Path) -> Path:
    return raw_tar(folder / "x.tar", [m for i in range(3) for m in sample_members(f"k{i}")])


def headers(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as opened:
        return opened.getmembers()


def read_all(path: Path) -> list[str]:
    reader = ShardReader([path])
    return [reader.read(0, i)["__key__"] for i in range(len(scan_checked(path).offsets))]


def test_a_walk_finds_every_sample(tmp_path: Path) -> None:
    path = three(tmp_path)
    scan = scan_shard(path)
    assert scan.problems == [] and scan.offsets.shape == (3, 3)
    assert scan.offsets[:, 0].tolist() == [member.offset for member in headers(path)[::2]]
    assert scan.offsets[:, 2].tolist() == [member.size for member in headers(path)[::2]]
    reader = ShardReader([path], [lambda: scan.offsets])
    for index in (2, 0, 1):
        raw = reader.read(0, index)
        assert raw["__key__"] == f"k{index}" and raw["png"] == encoded() and set(raw) > {"json", "__url__"}


@pytest.mark.parametrize("keep", [0, 1, BLOCK - 1])
def test_a_shard_cut_at_or_in_a_header_is_named(tmp_path: Path, keep: int) -> None:
    """``tarfile`` ends there in silence."""
    path = three(tmp_path)
    path.write_bytes(path.read_bytes()[: headers(path)[4].offset + keep])
    with tarfile.open(path) as opened:
        assert len(opened.getmembers()) == 4
    with pytest.raises(ConfigError, match=r"x\.tar: .*cut off.* after sample k1, which is left out"):
        scan_checked(path)
    assert len(scan_checked(path, skip=True).offsets) == 1  # nothing tells whether k1 had more members


@pytest.mark.parametrize("keep", [0, 1, BLOCK - 1])
def test_a_sample_cut_before_its_image_is_none(tmp_path: Path, keep: int) -> None:
    """A question without its image would be a sample as good as any."""
    path = three(tmp_path)
    path.write_bytes(path.read_bytes()[: headers(path)[5].offset + keep])
    scan = scan_checked(path, skip=True)
    assert len(scan.offsets) == 2 and "sample k2, which is left out" in scan.problems[0]


@pytest.mark.parametrize(("member", "whole"), [(1, 0), (3, 1), (2, 0)])
def test_a_sample_before_a_damaged_header_is_none(tmp_path: Path, member: int, whole: int) -> None:
    path = three(tmp_path)
    data = bytearray(path.read_bytes())
    data[headers(path)[member].offset] ^= 0xFF
    path.write_bytes(data)
    scan = scan_checked(path, skip=True)
    assert len(scan.offsets) == whole and "bytes are not read" in scan.problems[0]


def test_a_foreign_member_within_a_sample_leaves_it_out(tmp_path: Path) -> None:
    """Between two samples it does no harm."""
    first, second = sample_members("a"), sample_members("b")
    path = raw_tar(tmp_path / "x.tar", [first[0], ("a.pth", b"x"), first[1], ("README.md", b"x"), *second])
    scan = scan_checked(path, skip=True)
    assert len(scan.problems) == 2
    assert [ShardReader([path], [lambda: scan.offsets]).read(0, i)["__key__"] for i in range(len(scan.offsets))] == [
        "b"
    ]


@pytest.mark.parametrize("member", [4, 5])
def test_a_shard_cut_in_its_data_loses_that_sample_alone(tmp_path: Path, member: int) -> None:
    path = three(tmp_path)
    path.write_bytes(path.read_bytes()[: headers(path)[member].offset_data + 5])
    with pytest.raises(ConfigError, match=r"x\.tar: is cut off or broken .* after sample k2"):
        scan_checked(path)
    scan = scan_checked(path, skip=True)
    assert len(scan.offsets) == 2 and len(scan.problems) == 1


def test_a_damaged_header_and_data_behind_the_end_are_named(tmp_path: Path) -> None:
    path = three(tmp_path)
    whole = path.read_bytes()
    data = bytearray(whole)
    data[headers(path)[2].offset] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="has a damaged header at byte .* after sample k0"):
        scan_checked(path)
    path.write_bytes(whole + whole)  # `cat a.tar b.tar`
    with pytest.raises(ConfigError, match="has data behind its end mark at byte"):
        scan_checked(path)


def test_repeated_and_interleaved_keys_are_named(tmp_path: Path) -> None:
    """A repeated sample counts once; members that stand apart make no sample."""
    a, b = sample_members("a"), sample_members("b")
    cases = {"repeated": ([*a, *b, *a], ["a", "b"]), "interleaved": ([a[0], b[0], a[1], b[1]], [])}
    for name, (members, whole) in cases.items():
        path = raw_tar(tmp_path / f"{name}.tar", members)
        with pytest.raises(ConfigError, match=rf"{name}\.tar: sample a comes again at byte"):
            scan_checked(path)
        scan = scan_checked(path, skip=True)
        reader = ShardReader([path], [lambda scan=scan: scan.offsets])
        assert [reader.read(0, i)["__key__"] for i in range(len(scan.offsets))] == whole


def test_foreign_members_links_and_others_are_named_together(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as opened:
        for name, kind in (("k.json", tarfile.SYMTYPE), ("a.pth", tarfile.REGTYPE), ("p.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member)
    with pytest.raises(ConfigError) as error:
        scan_checked(tmp_path / "x.tar")
    assert ["not a regular file" in p or "expected KEY.EXTENSION" in p for p in error.value.problems] == [True] * 3


def test_several_numbered_images_are_one_sample(tmp_path: Path) -> None:
    members = [("k.json", b"{}"), ("k.0.png", encoded()), ("k.1.PNG", b"x")]
    path = raw_tar(tmp_path / "x.tar", members)
    assert len(scan_checked(path).offsets) == 1
    raw = ShardReader([path]).read(0, 0)
    assert (raw["0.png"], raw["1.png"]) == (encoded(), b"x")


def test_long_names_pax_headers_and_folders(tmp_path: Path) -> None:
    long = "folder/" + "k" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as opened:
            opened.add(tmp_path, "folder", recursive=False)
            for key in ("folder/a", long if form != tarfile.USTAR_FORMAT else "folder/b", "folder/ü"):
                for name, data in sample_members(key):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    opened.addfile(member, __import__("io").BytesIO(data))
                opened.add(tmp_path, "folder", recursive=False)
        assert read_all(path) == ["folder/a", long if form != tarfile.USTAR_FORMAT else "folder/b", "folder/ü"]


def test_a_file_that_changed_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    path = three(tmp_path)
    scan = scan_shard(path)
    with pytest.raises(ConfigError, match="has 3 samples, expected 5 or more"):
        ShardReader([path]).read(0, 4)
    raw_tar(path, [("z.json", b"{}" * 2000), *sample_members("k0")])
    reader = ShardReader([path], [lambda: scan.offsets])
    with pytest.raises(ConfigError, match=r"x\.tar: no sample where one should be"):
        reader.read(0, 1)
    path.unlink()
    with pytest.raises(ConfigError, match=r"x\.tar: cannot be read"):
        ShardReader([path], [lambda: scan.offsets]).read(0, 0)


@pytest.mark.parametrize("member", [2, 3])
def test_a_header_damaged_after_it_was_indexed_is_named(tmp_path: Path, member: int) -> None:
    """A sample is not taken for one with fewer members."""
    path = three(tmp_path)
    scan = scan_shard(path)
    data = bytearray(path.read_bytes())
    data[headers(path)[member].offset + 3] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.tar: no sample where one should be"):
        ShardReader([path], [lambda: scan.offsets]).read(0, 1)


def test_a_sample_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_SAMPLE_BYTES", 1000)
    with pytest.raises(SampleError, match="sample 0 has 2048 bytes, limit 1000"):
        ShardReader([three(tmp_path)]).read(0, 0)


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_OPEN_SHARDS", 2)
    paths = [raw_tar(tmp_path / f"{i}.tar", sample_members(f"k{i}")) for i in range(5)]
    reader = ShardReader(paths)
    for turn in range(2):
        assert [reader.read(i, 0)["__key__"] for i in range(5)] == [f"k{i}" for i in range(5)], turn
        assert len(reader._open) == 2
