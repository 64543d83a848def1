"""Hugging Face folders: safetensors files, one or several with an index, beside config, processor and tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from digrap_scale.checkpoint.atomic import save_error
from digrap_scale.checkpoint.formats.base import Box, Files, LazyTensor, Source, WriteOptions, boxed, bytes_of
from digrap_scale.errors import CheckpointError
from digrap_scale.safetensors_file import STEM, Entry, header_bytes, read_headers

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".lock", ".distcp"}


def detect(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"))
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def read(path: Path) -> Source:
    """Raises: CheckpointError."""
    return Source(
        path, "safetensors", tensors_of(read_headers(path)), companions=path if path.is_dir() else path.parent
    )


def tensors_of(headers: Mapping[str, Entry]) -> dict[str, LazyTensor]:
    """The tensors of open safetensors files. Raises: CheckpointError."""
    files = Files()
    return {
        name: boxed(
            name, entry.shape, entry.dtype, [Box(entry.file, entry.offset, (0,) * len(entry.shape), entry.shape)], files
        )
        for name, entry in headers.items()
    }


def write(source: Source, folder: Path, options: WriteOptions) -> None:
    """One file, or several with an index, and the source's companions; what the source keeps once is written once.

    Raises:
        SaveError: a file cannot be written.
    """
    copy_companions(source.companions, folder, source.left_out)
    stem = source.metadata.get("stem", STEM)
    # PEFT reads an adapter from one file only.
    shards = plan_shards(source.tensors, options.max_shard_bytes if stem == STEM else source.nbytes, stem)
    # As safetensors' own save_model notes what it leaves out.
    metadata = {alias: name for alias, name in source.aliases.items() if name in source.tensors}
    for file_name, names in shards.items():
        tensors = aligned(source.tensors[name] for name in names)
        with (folder / file_name).open("wb") as file:
            try:
                file.write(header_bytes({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, metadata))
                for tensor in tensors:
                    for piece in tensor.pieces():
                        file.write(bytes_of(piece))
                        options.advance(piece.nbytes)
                file.flush()  # so that a full disk shows here, with the file's name
            except OSError as error:
                raise save_error(folder / file_name, error) from error
    write_index(folder, shards, source.nbytes, stem)


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_bytes: int, stem: str = STEM) -> None:
    """The index of several files; one file has none."""
    if len(shards) < 2:
        return
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def aligned(tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """Widest elements first, which aligns every tensor to its element size, as safetensors itself does."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int, stem: str = STEM) -> dict[str, list[str]]:
    """File name → tensor names in their order, each file within ``max_shard_bytes`` unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def copy_companions(source: Path | None, folder: Path, left_out: Sequence[str] = ()) -> None:
    """Config, tokenizer and processor files: everything at the top of ``source`` but weights of any format."""
    if source is None:
        return
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHTS or path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        if path.is_file() and not is_weight and not path.name.startswith(".") and path.name not in left_out:
            try:
                path.open("rb").close()
            except OSError as error:  # apart from what cannot be written
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
