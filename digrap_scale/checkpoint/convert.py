"""From one checkpoint format to another: tensors stream through, a bounded piece at a time; no model is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from digrap_scale.checkpoint.atomic import atomic_folder
from digrap_scale.checkpoint.formats import WRITERS, open_source
from digrap_scale.checkpoint.formats.adapter import CONFIG, holds_adapter, own_adapter
from digrap_scale.checkpoint.formats.base import LazyTensor, Source, WriteOptions, bytes_of
from digrap_scale.checkpoint.formats.ours import refuse_incomplete
from digrap_scale.checkpoint.progress import progress_bar
from digrap_scale.errors import CheckpointError, ConfigError, SaveError
from digrap_scale.file_names import names_by_config

# Formats that are loaded by the model's own names, not by transformers.
_BY_MODULE = ("dcp", "zero")
OWN_BASE = ""  # what argparse gives for --merge-adapter without a value
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    world_size: int | None = None,
    dtype: str | None = None,
    merge_into: str | Path | None = None,
    companions: str | Path | None = None,
    max_shard_bytes: int = 4 << 30,
    verify: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """Writes the weights of ``source`` in another format.

    Args:
        source: a checkpoint of any format in ``formats.READERS``; its own files tell which.
        out: the folder to make, written beside its place and renamed when complete (and verified).
        to: a format in ``formats.WRITERS``.
        world_size: ranks to write for (``zero``: needed; ``dcp``: files to cut into, 1 by default).
        dtype: of all floating-point tensors (a name in ``DTYPES``); by default as stored. ZeRO's are float32 always.
        merge_into: ``source`` is a LoRA adapter or a checkpoint of a PEFT model in training, and this its base: the merged
            weights are written. ``OWN_BASE``: the checkpoint holds the base, too. None: of such a checkpoint, ``safetensors``
            gets the adapter alone, in PEFT's layout.
        companions: a folder whose config, processor and tokenizer files go with the weights (default: the source's own).
        max_shard_bytes: largest safetensors file (a larger tensor gets a file of its own).
        verify: read the result again with its format's reader, and compare every tensor's SHA-256 with the source's.
        overwrite: replace an existing ``out``.
        show_progress: a bar on the terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: options that do not fit together.
        CheckpointError: the source is missing, damaged, or not supported.
        SaveError: ``out`` exists, cannot be written, or does not read back as it should.
    """
    out = Path(out)
    _check(to, world_size, dtype, max_shard_bytes, Path(source), out)
    opened = open_source(source)
    own = opened.companions
    if companions is not None:
        if not Path(companions).is_dir():
            raise ConfigError(f"--companions {companions}: expected a folder with config and processor files")
        opened = replace(opened, companions=Path(companions))
    with_config = own if own is not None and (own / CONFIG).is_file() else opened.companions
    if merge_into is None:
        if to == "safetensors" and holds_adapter(opened):
            opened = own_adapter(opened, with_config)
    elif merge_into == OWN_BASE:
        if opened.format == "adapter":
            raise ConfigError(f"--merge-adapter: {source} holds an adapter alone; name its base: --merge-adapter BASE")
        from digrap_scale.checkpoint.merge import merge_own

        refuse_incomplete(opened)
        opened = merge_own(opened, with_config)
    else:
        if holds_adapter(opened):
            opened = own_adapter(opened, with_config)
        if opened.format != "adapter":
            raise ConfigError(
                f"--merge-adapter: {source} is no PEFT adapter (found: {opened.format}), and holds none; name the adapter first"
            )
        from digrap_scale.checkpoint.merge import merge_adapter  # brings PEFT along

        base = replace(open_source(merge_into), left_out=(CONFIG,))
        if companions is not None and (Path(companions) / "config.json").is_file():  # else it was the adapter's
            base = replace(base, companions=Path(companions))
        opened = merge_adapter(base, opened)
    refuse_incomplete(opened)
    if opened.format == "safetensors" and to in _BY_MODULE:
        opened = module_names(opened)
    opened = _cast(opened, torch.float32 if to == "zero" else None if dtype is None else DTYPES[dtype])
    with atomic_folder(out, overwrite=overwrite) as folder:
        with progress_bar(f"to {to}", opened.nbytes, show_progress) as advance:
            options = WriteOptions(world_size=world_size, max_shard_bytes=max_shard_bytes, advance=advance)
            WRITERS[to](opened, folder, options)
        if verify:
            with progress_bar("verify", 2 * opened.nbytes, show_progress) as advance:
                _verify(opened, open_source(folder), out, advance)
    return out


def _check(to: str, world_size: int | None, dtype: str | None, max_shard_bytes: int, source: Path, out: Path) -> None:
    problems = []
    if to not in WRITERS:
        problems.append(f"--to {to}: expected one of {', '.join(WRITERS)}")
    if to == "zero" and world_size is None:
        problems.append("--to zero needs --world-size: a ZeRO-3 checkpoint is cut for a number of ranks")
    if to == "safetensors" and world_size is not None:
        problems.append("--world-size does not apply to safetensors, which any number of ranks reads; remove it")
    if world_size is not None and world_size < 1:
        problems.append(f"--world-size {world_size}: expected at least 1")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if to == "zero" and dtype not in (None, "float32"):
        problems.append(
            f"--dtype {dtype}: ZeRO's checkpoints hold float32 masters; remove it (the engine casts by itself)"
        )
    if max_shard_bytes < 1:
        problems.append(f"--max-shard-bytes {max_shard_bytes}: expected at least 1")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        problems.append(f"{out}: the output would take the place of the source; choose another folder")
    if problems:
        raise ConfigError(problems)


def module_names(source: Source) -> Source:
    """A file's tensors under the names that they have in the model, its tied weights known."""
    names, tied = names_by_config(source.companions or source.path, source.tensors)
    renamed = source.renamed({file_name: name for name, file_name in names.items()})
    known = {alias: name for alias, name in tied.items() if name in renamed.tensors and alias not in renamed.tensors}
    return replace(renamed, aliases={**renamed.aliases, **known})


def _cast(source: Source, dtype: torch.dtype | None) -> Source:
    if dtype is None:
        return source
    for tensor in source.tensors.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise CheckpointError(
                f"{source.path}: {tensor.name}: {tensor.dtype} is quantised, and a cast would lose its scale; "
                "convert the checkpoint to bfloat16 with the tool that made it first"
            )
    return replace(source, tensors={name: tensor.to(dtype) for name, tensor in source.tensors.items()})


def _verify(source: Source, result: Source, out: Path, advance: Callable[[int], None]) -> None:
    expected = set(source.tensors)
    found = set(result.tensors)
    wrong = sorted((expected - found) | (found - expected - set(source.aliases)))
    if wrong:
        raise SaveError(f"{out}: verification failed: tensor {wrong[0]} is in only one of source and result")
    for name in result.tensors:
        tensor, written = source.tensors[source.aliases.get(name, name)], result.tensors[name]
        if (tensor.shape, tensor.dtype) != (written.shape, written.dtype):
            raise SaveError(
                f"{out}: verification failed: {name}: expected {tensor.dtype} {list(tensor.shape)}, "
                f"found {written.dtype} {list(written.shape)}"
            )
        hashes = [digest(tensor, advance), digest(written, advance)]
        if hashes[0] != hashes[1]:
            raise SaveError(
                f"{out}: verification failed: {name}: expected SHA-256 {hashes[0][:16]}…, found {hashes[1][:16]}…; "
                "the disk or the memory is faulty, or the source was changed meanwhile"
            )


def digest(tensor: LazyTensor, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a tensor's bytes."""
    hashed = hashlib.sha256()
    for piece in tensor.pieces():
        hashed.update(bytes_of(piece))
        advance(piece.nbytes)
    return hashed.hexdigest()
