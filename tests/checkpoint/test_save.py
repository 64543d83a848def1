"""Saves that are killed, fill the disk, or are tampered with: what holds, and what the user reads. One process."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.dcp import StoredParts, _apart, write_parts
from digrap_scale.checkpoint.layout import open_checkpoint
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.resume import find_checkpoint, open_together
from digrap_scale.checkpoint.safe_pickle import load_metadata
from digrap_scale.checkpoint.save import Contents, Saver
from digrap_scale.cli import main
from digrap_scale.config.schema import CheckpointConfig
from digrap_scale.errors import CheckpointError, SaveError
from digrap_scale.types import TensorPart
from tests.distributed.faulty import Fault, install

PHASES = ["state", "tensors", "torn", "generators", "checksums", "commit", "mark", "removal"]


def contents(step: int, rows: int = 64) -> Contents:
    value = torch.full((rows, 8), float(step))
    parts = [TensorPart("model.w", (rows, 8), 0, rows * 8, value.view(-1))]
    return Contents(
        step=step,
        state={"format": 1, "step": step, "world_size": 1},
        config="run: {}\n",
        parts=parts,
        method={"strength/w": torch.tensor(0.5)},
        method_notes={"method": "{}"},
        generators={"torch": torch.get_rng_state()},
        write_model=lambda folder: None,
    )


def saver(folder: Path, **settings: object) -> Saver:
    return Saver(folder, CheckpointConfig(**settings), Ranks(), lambda _: None)  # type: ignore[arg-type]


def save(folder: Path, *steps: int, **settings: object) -> None:
    one = saver(folder, **settings)
    for step in steps:
        one.save(contents(step))
    one.wait()
    one.close()


def in_a_child(action: Callable[[], None]) -> int:
    """How a forked process ended that did ``action``: its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_share_is_copied_without_what_lies_around_it() -> None:
    """DCP's copies for a save on a thread are of whole storages: those of which this rank writes a part would be whole."""
    whole, flat = torch.arange(40.0), torch.arange(8.0)
    parts = [TensorPart("share", (40,), 10, 15, whole[10:15])]
    parts += [TensorPart(f"half {i}", (4,), 0, 4, flat[4 * i : 4 * i + 4]) for i in range(2)]
    share, *halves = _apart(parts)
    assert share.tensor.untyped_storage().nbytes() == 20 and torch.equal(share.tensor, whole[10:15])
    assert all(found.tensor is given.tensor for found, given in zip(halves, parts[1:], strict=True))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_in_any_phase(phase: str, asynchronous: bool, tmp_path: Path) -> None:
    """At most one interval is lost, and a rerun's own save of that step goes through."""
    save(tmp_path, 10, 20, keep_last=2)

    def killed() -> None:
        fault = Fault({"rank": 0, "step": 0, "at": phase, "do": "SIGKILL"})
        install(fault)
        save(tmp_path, 30, keep_last=2, asynchronous=asynchronous)

    assert in_a_child(killed) == -signal.SIGKILL
    found, notes = find_checkpoint(tmp_path, "auto")
    assert found is not None
    if phase in ("mark", "removal"):  # it had been committed
        assert found.name == "step-30" and notes == []
    else:
        assert found.name == "step-20"
        last = {"checksums": "not committed", "commit": "not committed"}.get(phase, "rank 0")
        assert notes == [f"step-30 is incomplete ({last}); resuming from step-20"]
    assert float(open_together(found, Ranks()).state["step"]) == int(found.name.removeprefix("step-"))
    save(tmp_path, 30, 40, keep_last=2)
    assert [step for step, path in layout.found_steps(tmp_path).items() if layout.is_committed(path)] == [40, 30]
    open_checkpoint(layout.step_folder(tmp_path, 40))


def test_keeps_the_last_and_every_so_many(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40, 50, keep_last=2, keep_every_steps=20)
    assert list(layout.found_steps(tmp_path)) == [50, 40, 20]


def test_saves_and_removals_that_did_not_end_go(tmp_path: Path) -> None:
    """With the next commit, not before; a later one may be somebody's evidence, or is about to be written."""
    save(tmp_path, 10, 20, 30, 50, keep_last=4)
    for step in (10, 30, 50):
        (layout.step_folder(tmp_path, step) / layout.COMMITTED).unlink()
    (layout.step_folder(tmp_path, 10) / layout.STATE).unlink()
    save(tmp_path, 40, keep_last=3)
    assert list(layout.found_steps(tmp_path)) == [50, 40, 20]


def test_what_cannot_be_removed_yet_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open files stay on NFS as .nfs…, and their folder with them: told, and tried again after the next save."""
    save(tmp_path, 10, 20, keep_last=1)
    told: list[str] = []
    one = Saver(tmp_path, CheckpointConfig(keep_last=1), Ranks(), told.append)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: os.rmdir(folder))  # not empty
    one.save(contents(30))
    assert told[-1].startswith("step-20 cannot be removed yet") and "tried again after the next save" in told[-1]
    assert find_checkpoint(tmp_path, "auto")[0] == layout.step_folder(tmp_path, 30)
    monkeypatch.undo()
    one.save(contents(40))
    one.close()
    assert list(layout.found_steps(tmp_path)) == [40]


@pytest.mark.parametrize("limit", [2_000, 40_000])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full(limit: int, asynchronous: bool, tmp_path: Path) -> None:
    """A limit on files' sizes fails as a full disk does: in the first files, or in the tensors'."""
    save(tmp_path, 10)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        one = saver(tmp_path, asynchronous=asynchronous)
        try:
            one.save(contents(20, rows=4096))
            one.wait()
        except SaveError as error:
            (tmp_path / "message").write_text(str(error))
            os._exit(error.exit_code)
        finally:
            os._exit(99)

    assert in_a_child(full) == 4
    message = (tmp_path / "message").read_text()
    assert "disk full saving" in message and "step-20" in message and message.endswith("; step-10 is intact")
    assert list(layout.found_steps(tmp_path)) == [10], "half a checkpoint is left"
    open_checkpoint(layout.step_folder(tmp_path, 10))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # an error's frames may hold a file open


def fill(disk: Path, left: int) -> None:
    """Somebody else takes the room, but for so many bytes."""
    with (disk / "others").open("ab") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_disk_that_is_full(when: str, asynchronous: bool, small_disk: Path) -> None:
    """Before the save, which then does not begin; or after it looked for room, so that the tensors' own file fails."""
    save(small_disk, 10)
    whole = contents(20, rows=4096)
    if when == "before":
        fill(small_disk, left=1 << 20)
    else:
        whole.write_model = lambda _: fill(small_disk, left=50_000)
    one = saver(small_disk, asynchronous=asynchronous)
    with pytest.raises(SaveError, match=r"disk full saving .*step-20.*; step-10 is intact") as caught:
        one.save(whole)
        one.wait()
    one.close()
    assert caught.value.exit_code == 4 and ("free in" in str(caught.value)) == (when == "before")
    assert list(layout.found_steps(small_disk)) == [10], "half a checkpoint is left"
    open_checkpoint(layout.step_folder(small_disk, 10))
    (small_disk / "others").unlink()
    save(small_disk, 20)


def test_deepspeed_s_own_file_on_a_full_disk(small_disk: Path) -> None:
    """Its torch.save writes by C++, which keeps no cause."""
    save(small_disk, 10)

    def native(folder: Path) -> None:
        folder.mkdir()
        fill(small_disk, left=50_000)
        torch.save({"weights": torch.ones(100_000)}, folder / "mp_rank_00_model_states.pt")

    whole = contents(20)
    whole.write_native = native
    one = saver(small_disk)
    with pytest.raises(SaveError, match=r"disk full saving .*step-20; .*; step-10 is intact"):
        one.save(whole)
    one.close()
    assert list(layout.found_steps(small_disk)) == [10], "half a checkpoint is left"


@pytest.mark.parametrize(
    ("to", "left"), [("dcp", 100_000), ("zero", 100_000), ("zero", 2_000), ("safetensors", 100_000)]
)
def test_conversion_on_a_full_disk(
    to: str, left: int, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file's frame, which torch.save writes, as in the data."""
    (tmp_path / "in").mkdir()
    save_file({f"w{i}": torch.ones(300) for i in range(300)}, tmp_path / "in" / "model.safetensors")
    fill(small_disk, left)
    ranks = [] if to == "safetensors" else ["--world-size", "2"]
    assert main(["convert", str(tmp_path / "in"), str(small_disk / "out"), "--to", to, *ranks]) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"disk full saving {small_disk}")
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(
        SaveError, match="disk full saving step-20: it needs 0.02 GiB, 0.00 GiB are free .*; step-10 is"
    ):
        save(tmp_path, 20)
    assert list(layout.found_steps(tmp_path)) == [10]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Path]:
    save(tmp_path, 10, 20)
    yield tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda f: flip(f / "dcp/__0_0.distcp"), "dcp/__0_0.distcp: its SHA-256 differs"),
    "bit flip in the state": (lambda f: flip(f / "state.json"), "state.json: its SHA-256 differs"),
    "bit flip in the config": (lambda f: flip(f / "config.yaml"), "config.yaml: its SHA-256 differs"),
    "missing rank": (lambda f: (f / "dcp/__0_0.distcp").unlink(), "dcp/__0_0.distcp: missing"),
    "missing generators": (lambda f: (f / "rng/rank-0.safetensors").unlink(), "rng/rank-0.safetensors: missing"),
    "stale rank": (lambda f: (f / "dcp/__7_0.distcp").write_bytes(b"x"), "dcp/__7_0.distcp: not of this checkpoint"),
    "truncated": (lambda f: os.truncate(f / "method.safetensors", 9), "method.safetensors: expected"),
    "another list": (lambda f: flip(f / "checksums.json"), "checksums.json is not the one that was committed"),
    "no mark": (lambda f: (f / "COMMITTED").unlink(), "incomplete: it has no COMMITTED"),
    "empty mark": (lambda f: (f / "COMMITTED").write_bytes(b""), "COMMITTED or checksums.json cannot be read"),
    "renamed": (lambda f: f.rename(f.with_name("step-21")), "step-21: its state.json is of step 20"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(damage: str, two: Path) -> None:
    spoil, expected = DAMAGE[damage]
    folder = layout.step_folder(two, 20)
    spoil(folder)
    folder = folder.with_name("step-21") if damage == "renamed" else folder
    with pytest.raises(CheckpointError) as caught:
        open_together(folder, Ranks())
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert f"step-10 is whole: set checkpoint.resume: {layout.step_folder(two, 10)}" in str(caught.value)
    assert caught.value.exit_code == 3


def test_the_offer_is_checked_too(two: Path) -> None:
    for step in (10, 20):
        flip(layout.step_folder(two, step) / "dcp/__0_0.distcp")
    with pytest.raises(CheckpointError, match="no older checkpoint is whole"):
        open_together(layout.step_folder(two, 20), Ranks())


def test_weights_have_files_of_their_own(tmp_path: Path) -> None:
    """Who converts them reads, and hashes, no moments; both come back, also of a checkpoint with all in one file."""
    values = {
        "model.w": torch.arange(6.0),
        "optimizer.state.w.exp_avg": torch.ones(6),
        "method.previous.w": torch.zeros(6),
    }
    parts = [TensorPart(key, (6,), 0, 6, value) for key, value in values.items()]
    write_parts(tmp_path / "dcp", parts, None)
    places = load_metadata(tmp_path / "dcp").storage_data
    assert {index.fqn: place.relative_path for index, place in places.items()} == {
        "model.w": "__0_0.distcp",
        "optimizer.state.w.exp_avg": "__0_state_0.distcp",
        "method.previous.w": "__0_state_0.distcp",
    }
    dcp.save(values, checkpoint_id=tmp_path / "older", no_dist=True)
    for folder in ("dcp", "older"):
        read = [TensorPart(key, (6,), 0, 6, torch.empty(6)) for key in values]
        StoredParts(tmp_path / folder).read(read)
        assert all(torch.equal(part.tensor, values[part.key]) for part in read)


def test_latest_is_never_trusted(two: Path) -> None:
    """Neither a link nor a file of that name decides."""
    (two / "checkpoints" / "latest").symlink_to("step-10")
    assert find_checkpoint(two, "auto")[0] == layout.step_folder(two, 20)


def test_who_is_missing(two: Path) -> None:
    folder = layout.step_folder(two, 20)
    (folder / "COMMITTED").unlink()
    (folder / "state.json").write_text(json.dumps({"step": 20, "world_size": 3}))
    _, notes = find_checkpoint(two, "auto")
    assert notes == ["step-20 is incomplete (ranks 1, 2); resuming from step-10"]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def recommit(folder: Path) -> None:
    """As somebody would who knows the format: checksums of what is there now."""
    files = {name: layout.checksum(folder / name) for name in layout.files_of(folder)}
    text = layout.encode({"files": files})
    (folder / "checksums.json").write_text(text)
    (folder / "COMMITTED").write_text(layout.committed_mark(20, text))


@pytest.mark.parametrize("file", ["dcp/.metadata", "dcp/__0_0.distcp"])
def test_a_hostile_pickle_runs_nothing(file: str, two: Path, tmp_path: Path) -> None:
    folder, marker = layout.step_folder(two, 20), tmp_path / "ran"
    if file.endswith("distcp"):
        torch.save(Evil(marker), folder / file)
        metadata = pickle.loads((folder / "dcp/.metadata").read_bytes())  # noqa: S301  our own
        for place in metadata.storage_data.values():
            place.length = (folder / file).stat().st_size
        (folder / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    else:
        (folder / file).write_bytes(pickle.dumps(Evil(marker)))
    recommit(folder)
    open_together(folder, Ranks())  # the sums are right
    part = TensorPart("model.w", (64, 8), 0, 512, torch.zeros(512))
    with pytest.raises(CheckpointError, match="refused"):
        StoredParts(folder / "dcp").read([part])
    assert not marker.exists(), "it ran"
