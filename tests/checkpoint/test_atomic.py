from __future__ import annotations

import os
import subprocess
import sys

import pytest

from digrap_scale.checkpoint.atomic import atomic_file, atomic_folder, write_file
from digrap_scale.errors import SaveError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill_disk():
    # opened without creating or renaming: as root, anything else could replace the device itself
    with open("/dev/full", "r+b", buffering=0) as file:
        file.write(b"x")


def test_file_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_file(path, "old")
    with atomic_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(path.parent) == ["a.json"]
    write_file(path, b"\x00")
    assert path.read_bytes() == b"\x00"


def test_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as beside:
        beside.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_full_disk(tmp_path):
    with pytest.raises(SaveError, match=r"disk full saving .*a\.json; free space"), atomic_file(tmp_path / "a.json"):
        fill_disk()
    with pytest.raises(SaveError, match=r"disk full saving .*final; free space"), atomic_folder(tmp_path / "final"):
        fill_disk()
    assert names(tmp_path) == []


def test_full_disk_inside_safetensors(tmp_path):
    """Its error is no OSError: the system's code is in the text only. A file size limit stands in for the full disk."""
    script = f"""
import resource, signal, torch
from safetensors.torch import save_file
from digrap_scale.checkpoint.atomic import atomic_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with atomic_folder({str(tmp_path / "final")!r}) as beside:
    save_file({{"a": torch.zeros(1000)}}, beside / "model.safetensors")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "SaveError: disk full saving" in done.stderr, done.stderr
    assert names(tmp_path) == []


def test_an_error_of_reading_is_not_called_one_of_saving(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "final"):
        (tmp_path / "source").read_text()
    assert names(tmp_path) == []


def test_folder_appears_when_complete(tmp_path):
    path = tmp_path / "runs" / "final"
    with atomic_folder(path) as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "a").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "x" and names(path.parent) == ["final"]


def test_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(SaveError, match="final: it exists"), atomic_folder(tmp_path / "final"):
        pytest.fail("must not start")


def test_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "final"
    with atomic_folder(path) as beside:
        (beside / "old").write_text("")
    with pytest.raises(RuntimeError), atomic_folder(path, overwrite=True) as beside:
        (beside / "new").write_text("")
        raise RuntimeError
    assert names(path) == ["old"]
    with atomic_folder(path, overwrite=True) as beside:
        (beside / "new").write_text("")
    assert names(path) == ["new"] and names(tmp_path) == ["final"]


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot save"):
        write_file(tmp_path / "file" / "a", "x")
    with pytest.raises(SaveError, match="cannot save"), atomic_folder(tmp_path / "file" / "a"):
        pytest.fail("must not start")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError, match="Permission denied"):
        write_file(tmp_path / "a", "x")
