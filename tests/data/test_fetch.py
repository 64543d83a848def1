"""Shards that a command gives: refused unless allowed, fetched once, checked, and then shards as any others."""

from __future__ import annotations

import functools
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.config.schema import DataConfig
from digrap_scale.data.fetch import Remote, local_copies, open_shards
from digrap_scale.data.loader import build_evaluation_loader
from digrap_scale.data.manifest import Manifest
from digrap_scale.data.shards import write_shards
from digrap_scale.errors import ConfigError, SaveError
from tests.data.samples import NumberTask, make_samples


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    write_shards(make_samples(30), folder, prefix="p", samples_per_shard=10)
    return folder


def patterns_of(origin: Path, tmp_path: Path) -> list[str]:
    """Each file that is fetched leaves a line in a log."""
    log = f"echo x >> {tmp_path}/log;"
    return [f"pipe:{log} cat {origin}/p.manifest.json", f"pipe:{log} cat {origin}/p-{{000000..000002}}.tar"]


def fetches(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().split())


def test_refused_by_default(origin: Path, tmp_path: Path) -> None:
    for pattern in (patterns_of(origin, tmp_path)[1], "https://host/p-000000.tar"):
        with pytest.raises(ConfigError, match="only local files are read; .* or set data.allow_commands: true"):
            open_shards([pattern], DataConfig(train=[pattern]))
    assert not (tmp_path / "log").exists()


def test_secure_mode_is_kept_to(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(ConfigError, match="expected no command where WDS_SECURE is set"):
        local_copies(patterns_of(origin, tmp_path), tmp_path / "cache")
    assert not (tmp_path / "log").exists()


def test_fetched_once_and_read_as_any_other(origin: Path, tmp_path: Path) -> None:
    """Manifest, offsets and three shards: five fetches, the first time alone."""
    patterns = patterns_of(origin, tmp_path)
    data = DataConfig(train=patterns, allow_commands=True, cache_folder=str(tmp_path / "cache"))
    for _ in range(2):
        shards = open_shards(patterns, data)
        assert fetches(tmp_path) == 5
        assert shards.counts == (10, 10, 10) and [path.name for path in shards.paths] == [
            f"p-00000{i}.tar" for i in range(3)
        ]
        assert all(offsets is not None and "cache" in str(offsets.path) for offsets in shards.offsets)  # type: ignore[attr-defined]
        for path in shards.paths:
            assert path.read_bytes() == (origin / path.name).read_bytes()
    local = str(origin / "p-000000.tar")
    assert local_copies([local], tmp_path / "cache") == [local]


def test_goes_on_where_it_was_killed(origin: Path, tmp_path: Path) -> None:
    patterns = patterns_of(origin, tmp_path)
    first, second, third = (Path(path) for path in local_copies(patterns, tmp_path / "cache"))
    second.unlink()
    second.with_name(f".{second.name}.partial").write_bytes(b"half")  # as a killed process leaves it
    local_copies(patterns, tmp_path / "cache")
    assert fetches(tmp_path) == 6 and second.read_bytes() == (origin / second.name).read_bytes()
    assert first.exists() and third.exists() and not list(second.parent.glob(".*.partial"))


def test_other_bytes_than_the_manifest_says(origin: Path, tmp_path: Path) -> None:
    whole = (origin / "p-000001.tar").read_bytes()
    (origin / "p-000001.tar").write_bytes(whole[:-512] + b"x" * 512)
    with pytest.raises(
        ConfigError, match="p-000001.tar': expected sha256 [0-9a-f]{64} by its manifest, found [0-9a-f]{64}"
    ):
        local_copies(patterns_of(origin, tmp_path), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("p-*.tar")] == ["p-000000.tar"]


def test_failures_are_named_and_leave_nothing(origin: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="gone-1.tar': cannot be fetched: exit 1, cat: .*No such file"):
        local_copies([f"pipe:cat {origin}/gone-1.tar"], cache)
    with pytest.raises(ConfigError, match="p-000000.tar; exit 7': cannot be fetched: exit 7"):  # after all of its bytes
        local_copies([f"pipe:cat {origin}/p-000000.tar; exit 7"], cache)
    page = "a.tar.: cannot be fetched: expected a plain tar file, found b'<html>503"
    with pytest.raises(ConfigError, match=page):  # curl without -f ends well
        local_copies(["pipe:echo '<html>503 Service Unavailable</html>'; : a.tar"], cache)
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="data.cache_folder: .*file: cannot be written"):
        local_copies(patterns_of(origin, tmp_path), tmp_path / "file")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat x", "expected one name of a .tar or .manifest.json file in it, found none"),
        ("pipe:cat a.tar b.tar", "found a.tar, b.tar"),
        ("pipe:cat a-{0..1.tar", "the braces are not balanced"),
        ("https://host/a.tgz", "found none"),
    ],
)
def test_sources_without_a_name(pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        local_copies([pattern], tmp_path)


def test_a_manifest_puts_nothing_into_a_shell(origin: Path, tmp_path: Path) -> None:
    manifest = origin / "p.manifest.json"
    manifest.write_text(manifest.read_text().replace("p.offsets.npy", "p; touch stolen"))
    assert Manifest.read(manifest).offsets is not None
    with pytest.raises(ConfigError, match="it lists 'p; touch stolen'; expected letters, digits"):
        local_copies(patterns_of(origin, tmp_path), tmp_path / "cache")


def test_curl_gets_the_address_as_it_is(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one argument of a program, never through a shell."""
    program = tmp_path / "bin" / "curl"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nfor last; do :; done\nprintf "%s" "$last" > {tmp_path}/got\ncat {origin}/p-000000.tar\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    address = "https://host/a.tar?token=$(touch stolen);x"
    (copy,) = local_copies([address], tmp_path / "cache")
    assert (tmp_path / "got").read_text() == address
    assert Path(copy).read_bytes() == (origin / "p-000000.tar").read_bytes()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="cannot be fetched: no program curl"):
        local_copies(["https://host/b.tar"], tmp_path / "cache")


@pytest.fixture
def server(origin: Path) -> Iterator[str]:
    """A web server on this machine that has the shards; its address."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(origin))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_real_server(origin: Path, server: str, tmp_path: Path) -> None:
    patterns = [f"{server}/p.manifest.json", f"{server}/p-{{000000..000002}}.tar"]
    data = DataConfig(train=patterns, allow_commands=True, cache_folder=str(tmp_path / "cache"))
    shards = open_shards(patterns, data)
    assert shards.counts == (10, 10, 10)
    assert [path.read_bytes() for path in shards.paths] == [path.read_bytes() for path in sorted(origin.glob("*.tar"))]
    loader = build_evaluation_loader(shards, NumberTask(), batch_samples=8, rank=0, world_size=1, workers=0)
    keys = [key for batch in loader for key in batch.keys if key]
    assert sorted(set(keys)) == [f"s{i:06d}" for i in range(30)]
    with pytest.raises(ConfigError, match="p-000003.tar': cannot be fetched: exit 22, curl: .*404"):
        local_copies([f"{server}/p-000003.tar"], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*000003*.tar"))


def _fetch(patterns: list[str], cache: Path, results: Any) -> None:
    results.put(local_copies(patterns, cache))


def test_processes_share_the_work(origin: Path, tmp_path: Path) -> None:
    """Three at a time: every file is fetched once, and all of them find all of it."""
    slow = [pattern.replace("cat ", "sleep 0.2; cat ") for pattern in patterns_of(origin, tmp_path)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch, args=(slow, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert fetches(tmp_path) == 5 and found[0] == found[1] == found[2]
    assert all((origin / Path(path).name).read_bytes() == Path(path).read_bytes() for path in found[0])


def test_names_and_places(tmp_path: Path) -> None:
    one = Remote.of("pipe:aws s3 cp s3://bucket/set/train-000000.tar -")
    assert one.name == "train-000000.tar" and one.sibling("b.tar").source == "pipe:aws s3 cp s3://bucket/set/b.tar -"
    assert one.place(tmp_path).parent == Remote.of(one.sibling("t.manifest.json").source).place(tmp_path).parent
    other = Remote.of("pipe:aws s3 cp s3://bucket/other/train-000000.tar -")
    assert other.place(tmp_path).parent != one.place(tmp_path).parent
