"""Damaged safetensors as a reference: one line that names the file and the tensor or what is wrong, exit 3, no crash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from digrap_scale.errors import CheckpointError
from digrap_scale.reference.store import SafetensorsReader


def file_of(header: str | dict[str, object], data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
END = 8 + len(json.dumps(GOOD)) + 16  # of a good file
# what is wrong → the file's bytes, and what is said of it
DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing in it": (lambda: b"", "it has 0 bytes"),
    "cut in its header": (lambda: file_of(GOOD, bytes(16))[:20], f"its header takes {END - 24} bytes, the file has 20"),
    "cut in its data": (lambda: file_of(GOOD, bytes(16))[:-3], f"tensor b: ends at byte {END}, the file has {END - 3}"),
    "more data than tensors": (
        lambda: file_of(GOOD, bytes(20)),
        f"its tensors end at byte {END}, the file has {END + 4}",
    ),
    "a hole": (
        lambda: file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
        r"tensor b: expected its data at byte \d+, after a, found them at \d+: a hole",
    ),
    "an overlap": (
        lambda: file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        r"tensor b: expected its data at byte \d+, after a, found them at \d+: an overlap",
    ),
    "beyond the end": (
        lambda: file_of({"a": entry(0, 8), "b": entry(8, 160)}, bytes(16)),
        r"tensor b: ends at byte \d+, the file has \d+",
    ),
    "backwards": (lambda: file_of({"a": entry(8, 0, [2])}, bytes(8)), "tensor a: expected .* found .*, 8 to 0"),
    "a negative offset": (
        lambda: file_of({"a": entry(-8, 0, [2])}, bytes(8)),
        "tensor a: expected .* found .*, -8 to 0",
    ),
    "a shape of another size": (
        lambda: file_of({"a": entry(0, 8, [3])}, bytes(8)),
        r"tensor a: F32 \[3\] takes 12 bytes, its data_offsets give 8",
    ),
    "an overflowing shape": (
        lambda: file_of({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)),
        r"tensor a: F32 .* bytes, its data_offsets give 8",
    ),
    "a header longer than the file": (
        lambda: file_of(GOOD, bytes(16), length=1 << 20),
        f"its header takes {1 << 20} bytes, the file has {END}",
    ),
    "an oversized header": (
        lambda: file_of(GOOD, bytes(16), length=1 << 62),
        f"its header takes {1 << 62} bytes, the file has {END}",
    ),
    "one name twice": (
        lambda: file_of(f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}', bytes(16)),
        "'a' is there twice",
    ),
    "no JSON": (lambda: file_of("{" * 40, bytes(16)), "Expecting property name"),
    "no object": (lambda: file_of("[]", bytes(16)), "its header is no JSON object"),
    "no entry": (lambda: file_of({"a": {"dtype": "F32"}}, b""), "tensor a: expected dtype, shape and two data_offsets"),
    "an unknown dtype": (
        lambda: file_of({"a": {**entry(0, 8), "dtype": "F33"}}, bytes(8)),
        "tensor a: expected a dtype of the format, found 'F33'",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_one_line_that_names_what_is_wrong(what: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content, expected = DAMAGED[what]
    file.write_bytes(content())
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value).splitlines()) == 1
    assert re.search(expected, str(caught.value)), str(caught.value)
    assert caught.value.exit_code == 3
    with pytest.raises(SafetensorError):  # safetensors itself does not take it either
        with safe_open(file, framework="pt") as opened:
            raise (
                SafetensorError("one of two of the same name")
                if what == "one name twice" and opened.keys()
                else AssertionError
            )


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(file_of(GOOD, bytes(16)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json: .*'a' is there twice"):
        SafetensorsReader(index)


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
