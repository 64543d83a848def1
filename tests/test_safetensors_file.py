"""Damaged and hostile safetensors files: one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import header_bytes, read_header, read_headers


def entry(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def raw(header: str | dict[str, Any], data: int = 8, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


TWICE = f'{{"w": {json.dumps(entry(0, 4, [1]))}, "w": {json.dumps(entry(4, 8, [1]))}}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        raw({"w": entry(0, 8, [2])}, data=7),
        raw({"w": entry(0, 8, [2])}, data=9),
        raw({"w": entry(0, 4, [1]), "v": entry(6, 10, [1])}, data=10),
        raw({"w": entry(0, 8, [2]), "v": entry(4, 8, [1])}),
        raw({"w": entry(0, 8, [3])}),
        raw({"w": entry(8, 0, [2])}),
        raw({"w": {**entry(0, 8, [2]), "dtype": "F99"}}),
        raw({"w": entry(0, 8, [2])}, length=1 << 40),
        raw("{" * 100_000),
        raw("[]"),
        raw(TWICE),
    ],
    ids=["empty", "short", "truncated", "longer", "hole", "overlap", "shape", "backwards", "dtype", "oversized", "nested",
         "no object", "name twice"],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a readable safetensors file") as caught:
        read_header(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_offsets_lead_to_the_data(tmp_path: Path) -> None:
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7, dtype=torch.int16), "none": torch.zeros(0, 2)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt", "k": "v"})
    entries, metadata = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert metadata == {"format": "pt", "k": "v"} and set(entries) == set(state)
    for name, tensor in state.items():
        found = entries[name]
        assert (found.shape, found.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert (
            content[found.offset : found.offset + tensor.nbytes]
            == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    ordered = {name: (found.dtype, found.shape) for name, found in entries.items()}
    start = min(found.offset for found in entries.values())
    assert json.loads(header_bytes(ordered, metadata)[8:]) == json.loads(content[8:start])


@pytest.mark.parametrize("name", ["../m.safetensors", "/m.safetensors", "C:\\m.safetensors", "m.bin", 3])
def test_indexes_stay_in_their_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="tensor w points to"):
        read_headers(tmp_path)
