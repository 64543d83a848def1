"""WiSE-FT: θ = (1 − α)·A + α·B between two checkpoints, tensor by tensor (Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from digrap_scale.checkpoint.atomic import atomic_folder, save_error
from digrap_scale.checkpoint.formats.base import LazyTensor, bytes_of
from digrap_scale.checkpoint.formats.huggingface import aligned, copy_companions, plan_shards, tensors_of, write_index
from digrap_scale.checkpoint.progress import progress_bar
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.safetensors_file import FLOATS, Entry, differing_names, header_bytes, read_headers

_COPIED = ("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")
_SHOWN = 8
_PIECE_ELEMENTS = 1 << 23
Entries = Mapping[str, Entry]


def interpolate(
    folder_a: str | Path,
    folder_b: str | Path,
    out: str | Path | Mapping[float, str | Path],
    alphas: Sequence[float],
    *,
    max_shard_bytes: int = 4 << 30,
    overwrite: bool = False,
    show_progress: bool = False,
) -> dict[float, Path]:
    """Writes θ = (1 − α)·A + α·B for every α, in one pass over A and B.

    Floating-point tensors are computed in float32 (float64 where either is) and stored in B's dtype; all others, and
    BatchNorm's ``num_batches_tracked``, are B's. α = 0 and α = 1 give A's and B's values unchanged. Config, tokenizer
    and processor files are copied from B. Peak memory: a few pieces of 8 M elements, whatever the model's size and the
    number of α; the output is written straight into its files.

    Args:
        folder_a: the pre-trained weights: a folder, a ``.safetensors`` file or its index.
        folder_b: the fine-tuned model's folder, in Hugging Face layout.
        out: the folder for each α; a single path is the folder itself for one α, and the parent of ``alpha-0.25``,
            ``alpha-0.5`` ... for several. Every folder is written beside its place and renamed when complete.
        alphas: weights of B, each in [0, 1].
        max_shard_bytes: largest weight file (a larger tensor gets a file of its own).
        overwrite: replace existing output folders.
        show_progress: a bar on the terminal.

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
    headers_a, headers_b = read_headers(folder_a), read_headers(folder_b)
    _check_same(headers_a, headers_b, folder_a, folder_b)
    a, b = tensors_of(headers_a), tensors_of({name: headers_b[name] for name in sorted(headers_b)})
    shards = plan_shards(b, max_shard_bytes)
    with ExitStack() as stack:
        folders = {
            alpha: stack.enter_context(atomic_folder(path, overwrite=overwrite)) for alpha, path in targets.items()
        }
        total = len(targets) * sum(tensor.nbytes for tensor in b.values())
        advance = stack.enter_context(progress_bar("interpolate", total, show_progress))
        for file_name, names in shards.items():
            _write_shard(file_name, aligned(b[name] for name in names), a, folders, targets, advance)
        for folder in folders.values():
            copy_companions(folder_b, folder)
            write_index(folder, shards, sum(tensor.nbytes for tensor in b.values()))
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


def _check_same(a: Entries, b: Entries, path_a: Path, path_b: Path) -> None:
    lines = []
    if a.keys() != b.keys():
        lines.append(differing_names(set(a), set(b), f"only in {path_a}", f"only in {path_b}"))
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            lines.append(f"{name}: shape {list(a[name].shape)} in A, {list(b[name].shape)} in B")
        elif (a[name].code in FLOATS) != (b[name].code in FLOATS):
            lines.append(f"{name}: dtype {a[name].code} in A, {b[name].code} in B")
        elif b[name].code not in FLOATS and b[name].code not in _COPIED:
            lines.append(
                f"{name}: dtype {b[name].code} is quantised; convert both checkpoints to bfloat16 or float32 first"
            )
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"cannot interpolate {path_a} (A) and {path_b} (B): "
            + "; ".join(lines[:_SHOWN] + more)
            + "; both must be checkpoints of one architecture"
        )


def _write_shard(
    file_name: str,
    tensors: Sequence[LazyTensor],
    a: Mapping[str, LazyTensor],
    folders: Mapping[float, Path],
    targets: Mapping[float, Path],
    advance: Callable[[int], None],
) -> None:
    """One weight file of every α. The header is known beforehand, so pieces of tensors go straight to disk."""
    header = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    with ExitStack() as stack:
        files: dict[float, BinaryIO] = {}
        for alpha, folder in folders.items():
            files[alpha] = stack.enter_context((folder / file_name).open("wb"))
            files[alpha].write(header_bytes(header, {"interpolation_alpha": f"{alpha:g}"}))
        for tensor in tensors:
            for start in range(0, tensor.numel, _PIECE_ELEMENTS):
                stop = min(start + _PIECE_ELEMENTS, tensor.numel)
                piece_a, piece_b = (source.read(start, stop) for source in (a[tensor.name], tensor))
                for alpha, file in files.items():
                    try:
                        file.write(bytes_of(mix(tensor.name, piece_a, piece_b, alpha)))
                        file.flush()  # so that a full disk shows here, with the file's name
                        advance(piece_b.nbytes)
                    except OSError as error:
                        raise save_error(targets[alpha] / file_name, error) from error


def mix(name: str, a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 − α)·a + α·b of (a part of) the tensor ``name``, in b's dtype; see ``interpolate``."""
    if not b.is_floating_point() or name.rsplit(".", 1)[-1] == "num_batches_tracked" or alpha == 1:
        return b
    if alpha == 0:  # no arithmetic: 0 · inf would make a NaN of a mask's -inf
        return a.to(b.dtype)
    compute = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(compute).mul(1 - alpha).add_(b.to(compute), alpha=alpha).to(b.dtype)
