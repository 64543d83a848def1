"""Nothing in a checkpoint's pickles runs; what DeepSpeed and DCP store is read as it was."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from digrap_scale.checkpoint.safe_pickle import SafeLoadPlanner, SafeReader, load_metadata, load_pt
from digrap_scale.errors import CheckpointError


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


class Harmless:
    pass


def save_dcp(folder: Path) -> dict[str, Any]:
    state = {
        "a": torch.arange(12.0).view(3, 4),
        "nested": {"empty": torch.zeros(0, 2), "number": 5, "one": torch.ones((), dtype=torch.bfloat16)},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.parametrize("data", [True, False])
def test_hostile_pt_is_refused_and_runs_nothing(tmp_path: Path, data: bool) -> None:
    torch.save({"module": Hostile(tmp_path / "proof")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: refused: it names (posix|os)\.system") as caught:
        load_pt(tmp_path / "x.pt", data=data)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "proof").exists()  # the pickle is a hostile one indeed


def test_foreign_class_in_a_pt_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Harmless()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"it names tests\.checkpoint\.test_safe_pickle\.Harmless"):
        load_pt(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04rest", pickle.dumps({"a": 1})])
def test_damaged_pt_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: ") as caught:
        load_pt(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_offsets_lead_to_the_data(tmp_path: Path) -> None:
    """What the readers of other formats rest on."""
    values = torch.randn(5, 3)
    torch.save({"x": values, "y": torch.arange(3)}, tmp_path / "x.pt")
    storage = load_pt(tmp_path / "x.pt", data=False)["x"].untyped_storage()
    start = storage._checkpoint_offset
    assert (tmp_path / "x.pt").read_bytes()[start : start + 60] == values.numpy().tobytes()


def test_metadata_is_what_torch_reads(tmp_path: Path) -> None:
    save_dcp(tmp_path / "c")
    ours = load_metadata(tmp_path / "c")
    with (tmp_path / "c" / ".metadata").open("rb") as file:
        theirs = pickle.load(file)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data and ours.version == theirs.version


def test_dcp_loads_through_the_safe_reader(tmp_path: Path) -> None:
    state = save_dcp(tmp_path / "c")
    loaded = {
        "a": torch.zeros(3, 4),
        "nested": {"empty": torch.zeros(0, 2), "number": 0, "one": torch.zeros((), dtype=torch.bfloat16)},
    }
    dcp.load(loaded, storage_reader=SafeReader(tmp_path / "c"), planner=SafeLoadPlanner(), no_dist=True)
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["nested"]["number"] == 5 and loaded["nested"]["one"] == 1


def test_hostile_metadata_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    save_dcp(tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "proof")))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: it names (posix|os)\.system"):
        SafeReader(tmp_path / "c").read_metadata()
    assert not (tmp_path / "proof").exists()


def test_hostile_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    dcp.save({"x": Hostile(tmp_path / "proof")}, checkpoint_id=tmp_path / "c", no_dist=True)
    # DCP wraps what a rank raises into an exception of its own, which is no subclass of Exception.
    with pytest.raises(CheckpointException, match=r"DCP entry x: refused"):
        dcp.load({"x": 0}, storage_reader=SafeReader(tmp_path / "c"), planner=SafeLoadPlanner(), no_dist=True)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["../out.distcp", "/etc/passwd", "..\\out", "C:\\out"])
def test_metadata_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    save_dcp(tmp_path / "c")
    path = tmp_path / "c" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data[MetadataIndex("a", [0, 0])] = _StorageInfo(name, 0, 10)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="inside the checkpoint's own folder"):
        load_metadata(tmp_path / "c")


def test_metadata_cannot_change_classes(tmp_path: Path) -> None:
    """A BUILD instruction on a class would set attributes of it, for the whole process."""
    # the class, (None, {"poison": "yes"}), BUILD
    program = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n(N(S'poison'\nS'yes'\ndtb."
    assert pickle.loads(program) is MetadataIndex and MetadataIndex.__dict__["poison"] == "yes"
    del MetadataIndex.poison  # type: ignore[attr-defined]
    (tmp_path / ".metadata").write_bytes(program)
    with pytest.raises(CheckpointError):
        load_metadata(tmp_path)
    assert not hasattr(MetadataIndex, "poison")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), pickle.dumps(3)])
def test_damaged_metadata_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: not a readable DCP metadata file") as caught:
        load_metadata(tmp_path)
    assert "\n" not in str(caught.value)
