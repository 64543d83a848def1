"""WiSE-FT: θ = (1 − α)·A + α·B between two checkpoints, tensor by tensor (Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from digrap_scale.checkpoint.atomic import atomic_folder, save_error
from digrap_scale.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_COPIED = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FOREIGN = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".lock"}
_ELEMENT_BYTES = {**_FLOATS, **_COPIED}
_SHOWN = 8


@dataclass(frozen=True)
class _Entry:
    """A stored tensor: where it is, and its header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def interpolate(
    folder_a: str | Path,
    folder_b: str | Path,
    out: str | Path | Mapping[float, str | Path],
    alphas: Sequence[float],
    *,
    max_shard_bytes: int = 4 << 30,
    overwrite: bool = False,
) -> dict[float, Path]:
    """Writes θ = (1 − α)·A + α·B for every α, in one pass over A and B.

    Floating-point tensors are computed in float32 (float64 where either is) and stored in B's dtype; all others, and
    BatchNorm's ``num_batches_tracked``, are B's. α = 0 and α = 1 give A's and B's values unchanged. Config, tokenizer
    and processor files are copied from B. Peak memory: a few copies of the largest tensor, whatever the model's size
    and the number of α; the output is written straight into its files.

    Args:
        folder_a: the pre-trained weights: a folder, a ``.safetensors`` file or its index.
        folder_b: the fine-tuned model's folder, in Hugging Face layout.
        out: the folder for each α; a single path is the folder itself for one α, and the parent of ``alpha-0.25``,
            ``alpha-0.5`` ... for several. Every folder is written beside its place and renamed when complete.
        alphas: weights of B, each in [0, 1].
        max_shard_bytes: largest weight file (a larger tensor gets a file of its own).
        overwrite: replace existing output folders.

    Returns:
        The folder of each α.

    Raises:
        ConfigError: α out of range or given twice, two outputs in one place, output equal to an input.
        CheckpointError: missing or unreadable weights, unsafe index paths, differing names or shapes.
        SaveError: an output exists already, or cannot be written.
    """
    folder_a, folder_b = Path(folder_a), Path(folder_b)
    targets = _targets(out, alphas, inputs=(folder_a, folder_b))
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    if not folder_b.is_dir():
        raise CheckpointError(
            f"{folder_b} is not a folder; B must be a model in Hugging Face layout (config and weights)"
        )
    a, b = _read_headers(folder_a), _read_headers(folder_b)
    _check_same(a, b, folder_a, folder_b)
    with ExitStack() as stack:
        folders = {
            alpha: stack.enter_context(atomic_folder(path, overwrite=overwrite)) for alpha, path in targets.items()
        }
        for folder in folders.values():
            _copy_companions(folder_b, folder)
        shards = _plan_shards(b, max_shard_bytes)
        for file_name, names in shards.items():
            _write_shard(file_name, names, a, b, folders, targets)
        if list(shards) != [WEIGHTS]:
            _write_index(shards, b, folders)
    return targets


def _targets(
    out: str | Path | Mapping[float, str | Path], alphas: Sequence[float], inputs: tuple[Path, ...]
) -> dict[float, Path]:
    problems = [f"alpha is {alpha}, expected a number from 0 to 1" for alpha in alphas if not 0 <= alpha <= 1]
    if not alphas:
        problems.append("no alpha given; name at least one number from 0 to 1")
    if len(set(alphas)) < len(alphas):
        problems.append(f"alphas {list(alphas)} name one twice; give each once")
    if isinstance(out, Mapping):
        problems += [f"no output folder given for alpha {alpha}" for alpha in alphas if alpha not in out]
        problems += [
            f"an output folder is given for alpha {alpha}, which is not asked for"
            for alpha in out
            if alpha not in alphas
        ]
    if problems:
        raise ConfigError(problems)
    if isinstance(out, Mapping):
        targets = {alpha: Path(out[alpha]) for alpha in alphas}
    elif len(alphas) == 1:
        targets = {alphas[0]: Path(out)}
    else:
        targets = {alpha: Path(out) / f"alpha-{alpha:g}" for alpha in alphas}
    places = [path.resolve() for path in targets.values()]
    if len(set(places)) < len(places):
        raise ConfigError(
            f"two alphas share the output folder among {[str(path) for path in targets.values()]}; give each its own"
        )
    for path in targets.values():
        if path.resolve() in {source.resolve() for source in inputs}:
            raise ConfigError(f"output folder {path} is one of the inputs; choose another")
    return targets


def _read_headers(path: Path) -> dict[str, _Entry]:
    """Name → entry of all tensors of a folder, a safetensors file or an index; reads headers only."""
    if path.is_dir():
        # as transformers does: the single file counts where both are there
        found = [path / name for name in (WEIGHTS, INDEX) if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}; give a folder with safetensors weights")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a folder, a .safetensors file or its index")
    if path.suffix != ".json":
        return _file_header(path)
    weight_map = _read_index(path)
    entries: dict[str, _Entry] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        listed = {name for name, file in weight_map.items() if file == file_name}
        header = _file_header(path.parent / file_name)
        if listed != set(header):
            raise CheckpointError(
                f"{path}: {file_name} does not hold what the index lists; "
                + _diff(listed, set(header), "listed", "stored")
            )
        entries.update(header)
    return entries


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors index (JSON with a weight_map): {type(error).__name__}: {error}"
        ) from error
    for name, file_name in items.items():
        if not isinstance(file_name, str) or not _is_inside(file_name):
            raise CheckpointError(
                f"{path}: tensor {name} points to {file_name!r}; expected a .safetensors file inside the folder"
            )
        if not (path.parent / file_name).is_file():
            raise CheckpointError(
                f"{path}: tensor {name} is in {file_name}, which is missing; copy the whole checkpoint"
            )
    return items


def _is_inside(file_name: str) -> bool:
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    absolute = posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    return not absolute and ".." not in (*posix.parts, *windows.parts) and file_name.endswith(".safetensors")


def _file_header(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: _Entry(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error


def _check_same(a: dict[str, _Entry], b: dict[str, _Entry], path_a: Path, path_b: Path) -> None:
    lines = []
    if a.keys() != b.keys():
        lines.append(_diff(set(a), set(b), f"only in {path_a}", f"only in {path_b}"))
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            lines.append(f"{name}: shape {list(a[name].shape)} in A, {list(b[name].shape)} in B")
        elif (a[name].dtype in _FLOATS) != (b[name].dtype in _FLOATS):
            lines.append(f"{name}: dtype {a[name].dtype} in A, {b[name].dtype} in B")
        elif b[name].dtype not in _FLOATS and b[name].dtype not in _COPIED:
            lines.append(
                f"{name}: dtype {b[name].dtype} is quantised; convert both checkpoints to bfloat16 or float32 first"
            )
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"cannot interpolate {path_a} (A) and {path_b} (B): "
            + "; ".join(lines[:_SHOWN] + more)
            + "; both must be checkpoints of one architecture"
        )


def _diff(left: set[str], right: set[str], left_title: str, right_title: str) -> str:
    parts = []
    for title, names in ((left_title, sorted(left - right)), (right_title, sorted(right - left))):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{title}: {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(parts)


def _copy_companions(source: Path, folder: Path) -> None:
    """Config, tokenizer and processor files of B: everything at its top level but weights of any format."""
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _FOREIGN or path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        if path.is_file() and not is_weight and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _plan_shards(entries: dict[str, _Entry], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name → tensor names, in name order, each file within ``max_shard_bytes`` unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(entries):
        if shards[-1] and filled + entries[name].bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entries[name].bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def _write_shard(
    file_name: str,
    names: list[str],
    a: dict[str, _Entry],
    b: dict[str, _Entry],
    folders: Mapping[float, Path],
    targets: Mapping[float, Path],
) -> None:
    """One weight file of every α. The header is known beforehand, so tensors go straight to disk, one at a time.

    Written by hand, as safetensors' ``save_file`` wants all tensors of a file in memory. Format: 8 bytes little-endian
    header length, JSON header padded with spaces to 8 bytes, tensors in the header's order without gaps.
    """
    # widest elements first keeps every tensor aligned to its element size, as safetensors itself does
    order = sorted(names, key=lambda name: (-_ELEMENT_BYTES[b[name].dtype], name))
    with ExitStack() as stack:
        files: dict[float, BinaryIO] = {}
        for alpha, folder in folders.items():
            files[alpha] = stack.enter_context((folder / file_name).open("wb"))
            files[alpha].write(_header(order, b, alpha))
        handles: dict[Path, Any] = {}
        for name in order:
            source_a, source_b = (_tensor(entries[name], name, handles, stack) for entries in (a, b))
            for alpha, file in files.items():
                tensor = _mix(name, source_a, source_b, alpha).contiguous()
                try:
                    file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                    file.flush()  # so that a full disk shows here, with the file's name
                except OSError as error:
                    raise save_error(targets[alpha] / file_name, error) from error
                del tensor  # before the next one is made: only one result is held at a time
            del source_a, source_b


def _header(order: list[str], entries: dict[str, _Entry], alpha: float) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "interpolation_alpha": f"{alpha:g}"}}
    offset = 0
    for name in order:
        stop = offset + entries[name].bytes
        header[name] = {
            "dtype": entries[name].dtype,
            "shape": list(entries[name].shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(entry: _Entry, name: str, handles: dict[Path, Any], stack: ExitStack) -> torch.Tensor:
    try:
        if entry.file not in handles:
            handles[entry.file] = stack.enter_context(safe_open(entry.file, framework="pt", device="cpu"))
        tensor: torch.Tensor = handles[entry.file].get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{entry.file}: cannot read tensor {name} ({error}); fetch the file again") from error
    return tensor


def _mix(name: str, a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 − α)·a + α·b in b's dtype."""
    if not b.is_floating_point() or name.rsplit(".", 1)[-1] == "num_batches_tracked" or alpha == 1:
        return b
    if alpha == 0:  # no arithmetic: 0 · inf would make a NaN of a mask's -inf
        return a.to(b.dtype)
    compute = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(compute).mul(1 - alpha).add_(b.to(compute), alpha=alpha).to(b.dtype)


def _write_index(shards: Mapping[str, list[str]], entries: dict[str, _Entry], folders: Mapping[float, Path]) -> None:
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in entries.values())},
        "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
    }
    for folder in folders.values():
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
