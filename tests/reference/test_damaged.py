"""Damaged safetensors as a reference: one line that names the file and the tensor or what is wrong, exit 3, no crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from digrap_scale.errors import CheckpointError
from digrap_scale.reference.store import SafetensorsReader


def file_of(header: str | dict[str, object], data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
# what is wrong → the file's bytes
DAMAGED: dict[str, Callable[[], bytes]] = {
    "nothing in it": lambda: b"",
    "cut in its header": lambda: file_of(GOOD, bytes(16))[:20],
    "cut in its data": lambda: file_of(GOOD, bytes(16))[:-3],
    "more data than tensors": lambda: file_of(GOOD, bytes(20)),
    "a hole": lambda: file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "an overlap": lambda: file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "beyond the end": lambda: file_of({"a": entry(0, 8), "b": entry(8, 160)}, bytes(16)),
    "backwards": lambda: file_of({"a": entry(8, 0, [2])}, bytes(8)),
    "a shape of another size": lambda: file_of({"a": entry(0, 8, [3])}, bytes(8)),
    "an overflowing shape": lambda: file_of({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)),
    "a header longer than the file": lambda: file_of(GOOD, bytes(16), length=1 << 20),
    "an oversized header": lambda: file_of(GOOD, bytes(16), length=1 << 62),
    "one name twice": lambda: file_of(
        f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}', bytes(16)
    ),
    "no JSON": lambda: file_of("{" * 40, bytes(16)),
    "an unknown dtype": lambda: file_of({"a": {**entry(0, 8), "dtype": "F33"}}, bytes(8)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_one_line_that_names_the_file(what: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGED[what]())
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 3


def test_the_undamaged_one_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(file_of(GOOD, bytes(16)))
    assert SafetensorsReader(file).names() == ["a", "b"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/../../x.safetensors", "missing.safetensors"])
def test_an_index_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path.parent / "x.safetensors").write_bytes(file_of(GOOD, bytes(16)))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(index)
    assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1
