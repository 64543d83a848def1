"""Shards from listed samples: limits, locks, and what becomes of killed runs and processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.data import make
from digrap_scale.data.make import Item, make_shards
from digrap_scale.errors import ConfigError, PeerError
from tests.data.processes import lives


def given(images: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return images


def item(key: str, *sizes: int, stamp: int = 0, extension: str = "jpeg", **meta: Any) -> Item:
    images = partial(given, [(extension, bytes([stamp] * size)) for size in sizes])
    return Item(key, meta, images, sizes, (stamp,))


def shards_of(folder: Path, prefix: str = "p") -> list[Path]:
    return sorted(folder.glob(f"{prefix}-*.tar"))


NAMES = ("s{}", "a/long/" + 100 * "x" + "{}", "größe{}", 95 * "y" + "{}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [0, 1, 20])
def test_the_size_of_a_shard_is_known_before(name: str, images: int, tmp_path: Path) -> None:
    draw = random.Random(f"{name} {images}")
    items = [
        item(name.format(i), *(draw.randrange(2000) for _ in range(images)), text="ä" * draw.randrange(600))
        for i in range(12)
    ]
    make_shards(items, tmp_path, prefix="p", samples_per_shard=100)
    (whole,) = shards_of(tmp_path)
    expected = make._file(sum(map(make._tar_bytes, items)))
    assert whole.stat().st_size == expected
    make_shards(items, tmp_path, prefix="p", samples_per_shard=100, shard_bytes=expected)
    assert len(shards_of(tmp_path)) == 1
    limit = expected - 1
    for _ in range(3):
        make_shards(items, tmp_path, prefix="p", samples_per_shard=100, shard_bytes=limit)
        for shard in shards_of(tmp_path):
            assert shard.stat().st_size <= limit or len({n.split(".")[0] for n in tarfile.open(shard).getnames()}) == 1
        assert len(shards_of(tmp_path)) > 1
        limit //= 2


def test_twenty_small_images_a_sample_stay_within_the_limit(tmp_path: Path) -> None:
    """Headers and padding are most of such a shard."""
    items = [item(f"s{i}", *[10] * 20) for i in range(200)]
    make_shards(items, tmp_path, prefix="p", samples_per_shard=1000, shard_bytes=10**6)
    sizes = [path.stat().st_size for path in shards_of(tmp_path)]
    assert len(sizes) == 5 and max(sizes) <= 10**6


def test_images_of_unknown_size_have_no_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sample a has images of unknown size"):
        make_shards([Item("a", {}, partial(given, []))], tmp_path, prefix="p", samples_per_shard=1, shard_bytes=9)


def test_a_killed_run_keeps_the_shards_whose_images_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two finished shards one has an image that changed since, in its bytes but not in its size."""
    write, written = make._write_shard, []

    def writes(path: Path, items: Any, skip: bool) -> None:
        if path.name == "p-000002.tar" and not written[2:]:
            written.append("killed")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, items, skip)

    monkeypatch.setattr(make, "_write_shard", writes)
    items = [item(f"s{i}", 10) for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        make_shards(items, tmp_path, prefix="p", samples_per_shard=2)
    items[3] = item("s3", 10, stamp=7)
    make_shards(items, tmp_path, prefix="p", samples_per_shard=2)
    assert written == ["p-000000.tar", "p-000001.tar", "killed", "p-000001.tar", "p-000002.tar"]
    with tarfile.open(tmp_path / "p-000001.tar") as tar:
        stored = tar.extractfile("s3.jpeg")
        assert stored is not None and stored.read() == bytes([7] * 10)
    assert not list(tmp_path.glob(".*"))


def hold(folder: Path, held: Any, done: Any) -> None:
    with make._alone(folder, "p"):
        held.set()
        done.wait(60)


def test_two_runs_do_not_make_the_same_shards(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, done))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError, match="another run makes shards p-\\*.tar; wait for it") as error:
            make_shards([item("a", 1)], tmp_path, prefix="p", samples_per_shard=1)
        assert len(error.value.problems) == 1
        make_shards([item("a", 1)], tmp_path, prefix="q", samples_per_shard=1)
    finally:
        done.set()
        other.join()
    make_shards([item("a", 1)], tmp_path, prefix="p", samples_per_shard=1)
    assert not list(tmp_path.glob(".*"))


def dies() -> list[tuple[str, bytes]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_a_killed_process_is_an_error_of_one_line(tmp_path: Path) -> None:
    items = [item("a", 1), Item("b", {}, dies), item("c", 1)]
    with pytest.raises(PeerError, match=r"a process that made shards p-\*.tar was killed") as error:
        make_shards(items, tmp_path, prefix="p", samples_per_shard=1, processes=2)
    assert "\n" not in str(error.value) and not shards_of(tmp_path)
    make_shards([item("a", 1), item("b", 1), item("c", 1)], tmp_path, prefix="p", samples_per_shard=1, processes=2)
    assert len(shards_of(tmp_path)) == 3


def waits(note: Path) -> list[tuple[str, bytes]]:
    note.write_text(str(os.getpid()))
    time.sleep(60)
    return []


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    """Neither writing on into the hidden folder, nor holding the lock of the run that goes on."""
    notes = [tmp_path / "a", tmp_path / "b"]
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "from tests.data.test_make import Item, make_shards, waits\n"
        "items = [Item(n, {}, partial(waits, Path(n))) for n in sys.argv[2:]]\n"
        "items = [Item(Path(i.key).name, i.meta, i.images) for i in items]\n"
        "make_shards(items, Path(sys.argv[1]), prefix='p', samples_per_shard=1, processes=2)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(out), *map(str, notes)])
    try:
        workers = [int(content) for note in notes if (content := _content(note))]
    finally:
        run.kill()
        run.wait()
    assert len(workers) == 2
    end = time.monotonic() + 30
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    make_shards([item("a", 1)], out, prefix="p", samples_per_shard=1)
    assert not list(out.glob(".*"))


def _content(note: Path) -> str:
    end = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    return note.read_text()
