"""Slices of safetensors files against the dense tensors, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from digrap_scale.errors import CheckpointError
from digrap_scale.reference.store import SafetensorsReader, load_slices
from digrap_scale.types import ShardSpec

INDEX_NAME = "model.safetensors.index.json"
SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (17,),
    "row": (1, 23),
    "column": (23, 1),
    "matrix": (5, 7),
    "conv": (3, 2, 4, 5),
    "narrow": (1, 1, 6, 2),
    "empty": (0, 3),
}


def values(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    shape = SHAPES[name]
    return (torch.arange(math.prod(shape)) + len(name)).reshape(shape).to(dtype)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsReader:
    path = tmp_path_factory.mktemp("store") / "model.safetensors"
    save_file({name: values(name) for name in SHAPES}, path)
    return SafetensorsReader(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_interval(reader: SafetensorsReader, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    numel = math.prod(SHAPES[name])
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    got = reader.read(name, start, stop)
    assert got.dtype == torch.bfloat16 and got.shape == (stop - start,)
    assert torch.equal(got, values(name).reshape(-1)[start:stop])


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=5), cuts=st.lists(st.integers(0, 1024), max_size=4))
def test_any_shape_in_any_pieces(tmp_path_factory: pytest.TempPathFactory, shape: list[int], cuts: list[int]) -> None:
    """Partitions of any size, put together again, are the tensor."""
    tensor = torch.randn(shape)
    path = tmp_path_factory.mktemp("shape") / "t.safetensors"
    save_file({"t": tensor}, path)
    reader = SafetensorsReader(path)
    edges = [0, *sorted(min(cut, tensor.numel()) for cut in cuts), tensor.numel()]
    pieces = [reader.read("t", a, b) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(pieces), tensor.reshape(-1))


def test_whole_tensors_and_what_is_known_before_reading(reader: SafetensorsReader) -> None:
    assert reader.names() == sorted(SHAPES) and "vector" in reader and "nothing" not in reader
    assert reader.shapes == SHAPES and set(reader.dtypes.values()) == {"BF16"}
    for name in SHAPES:
        assert torch.equal(reader.read(name), values(name).reshape(-1))


def test_only_the_touched_rows_are_read(reader: SafetensorsReader, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Slice:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __getitem__(self, index: object) -> torch.Tensor:
            got = self.inner[index]
            asked.append(got.numel())
            return got

    handle = reader._handle("conv")

    class Handle:
        def get_slice(self, name: str) -> Slice:
            return Slice(handle.get_slice(name))

    monkeypatch.setitem(reader._handles, reader.extent("conv")[0], Handle())
    reader.read("conv", 41, 44)  # inside one row: no more than asked for
    reader.read("conv", 38, 62)  # across two of dim 0: those two
    assert asked == [3, 80]


def write_index(folder: Path, weight_map: dict[str, str]) -> Path:
    path = folder / INDEX_NAME
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def test_index(two_files: Path) -> None:
    for path in (two_files, two_files / INDEX_NAME, str(two_files)):
        reader = SafetensorsReader(path)
        assert reader.names() == ["a", "b", "c"]
        assert reader.read("c", 1, 3).tolist() == [2.0, 2.0]


def test_folder_with_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert SafetensorsReader(tmp_path).names() == ["a"]


def bad_missing(folder: Path) -> Path:
    return folder / "nothing.safetensors"


def bad_empty_folder(folder: Path) -> Path:
    (folder / "void").mkdir()
    return folder / "void"


def bad_kind(folder: Path) -> Path:
    (folder / "model.bin").write_bytes(b"x")
    return folder / "model.bin"


def bad_truncated(folder: Path) -> Path:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return folder


def bad_header(folder: Path) -> Path:
    (folder / "two.safetensors").write_bytes(b"\xff" * 64)
    return folder


def bad_outside(folder: Path) -> Path:
    write_index(folder, {"a": "../x.safetensors"})
    return folder


def bad_absolute(folder: Path) -> Path:
    write_index(folder, {"a": str(folder / "one.safetensors")})
    return folder


def bad_file_of_index(folder: Path) -> Path:
    write_index(folder, {"a": "three.safetensors"})
    return folder


def bad_name_of_index(folder: Path) -> Path:
    write_index(folder, {"a": "one.safetensors", "z": "one.safetensors"})
    return folder


def bad_json(folder: Path) -> Path:
    (folder / INDEX_NAME).write_text("{")
    return folder


def bad_index_kind(folder: Path) -> Path:
    (folder / INDEX_NAME).write_text('["weight_map"]')
    return folder


def bad_map_kind(folder: Path) -> Path:
    (folder / INDEX_NAME).write_text('{"weight_map": ["a"]}')
    return folder


def bad_map_value(folder: Path) -> Path:
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": 3, "b": null}}')
    return folder


def bad_bytes(folder: Path) -> Path:
    (folder / INDEX_NAME).write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_missing, "nothing.safetensors: does not exist; give a folder, a .safetensors file or its index"),
        (bad_empty_folder, "void: has neither model.safetensors nor model.safetensors.index.json"),
        (bad_kind, "model.bin: expected a .safetensors file or its index"),
        (bad_truncated, "two.safetensors: not a readable safetensors file"),
        (bad_header, "two.safetensors: not a readable safetensors file"),
        (bad_outside, "tensor a points to '../x.safetensors'; expected a .safetensors file inside the folder"),
        (bad_absolute, "one.safetensors'; expected a .safetensors file inside the folder"),
        (bad_file_of_index, "tensor a is in three.safetensors, which is missing"),
        (bad_name_of_index, "one.safetensors does not hold what the index lists; listed: z; stored: b"),
        (bad_json, "not a safetensors index (JSON with a weight_map)"),
        (bad_index_kind, "not a safetensors index (JSON with a weight_map)"),
        (bad_map_kind, "not a safetensors index (JSON with a weight_map)"),
        (bad_map_value, "tensor a points to 3; expected a .safetensors file"),
        (bad_bytes, "not a safetensors index (JSON with a weight_map)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors(two_files: Path, make: object, message: str) -> None:
    path = make(two_files)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(path)
    assert message in str(caught.value) and str(two_files) in str(caught.value) and "\n" not in str(caught.value)


def test_slices_of_all_layers(tmp_path: Path) -> None:
    """Stored dtype; several names for a tied weight must agree; no name, no slice."""
    w = torch.randn(4, 3).to(torch.bfloat16)
    other = w.clone()
    other[3, 2] += 1
    save_file({"w": w, "same": w.clone(), "other": other}, tmp_path / "model.safetensors")
    reader, cpu = SafetensorsReader(tmp_path), torch.device("cpu")

    def slices(start: int, stop: int, *names: str) -> torch.Tensor:
        specs = [ShardSpec("w", (4, 3), start, stop), ShardSpec("new", (2,), 0, 2)]
        tied, absent = load_slices(reader, specs, {"w": names}, cpu)
        assert absent is None and tied is not None
        return tied

    for names in (("w",), ("w", "same")):
        got = slices(5, 9, *names)
        assert got.dtype == torch.bfloat16 and torch.equal(got, w.view(-1)[5:9])
        assert got.untyped_storage().nbytes() == 4 * 2, "the slice holds more memory than its own bytes"
    assert slices(7, 7, "w", "other").shape == (0,)
    with pytest.raises(CheckpointError, match="'w' and 'other' differ, but the model ties them into one parameter"):
        slices(6, 12, "w", "other")
