"""DeepSpeed's universal checkpoints (``ds_to_universal``): a folder ``zero/NAME/`` for each parameter, its master in ``fp32.pt``.

Names, shapes, buffers and frozen parameters are in the model states that are copied beside it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from digrap_scale.checkpoint.formats.base import Files, LazyTensor, Source
from digrap_scale.checkpoint.formats.zero import ModelStates, pt_tensor, tag_folder
from digrap_scale.checkpoint.safe_pickle import load_pt
from digrap_scale.errors import CheckpointError


def detect(path: Path) -> bool:
    folder = tag_folder(path, "latest_universal")
    return folder is not None and (folder / "zero").is_dir()


def read(path: Path) -> Source:
    """Raises: CheckpointError."""
    folder = tag_folder(path, "latest_universal")
    assert folder is not None
    files = Files()
    model = ModelStates(folder, files)
    masters = {
        name: _master(folder / "zero" / name / "fp32.pt", name, shape, files)
        for group in model.groups
        for name, shape in group.items()
    }
    return Source(path, "universal", model.all_tensors(masters), aliases=model.shared)


def _master(file: Path, name: str, shape: tuple[int, ...], files: Files) -> LazyTensor:
    content = load_pt(file, data=False)
    tensor = content.get("param") if isinstance(content, dict) else content  # stage 3 stores the flat tensor itself
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != math.prod(shape):
        found = tensor.numel() if isinstance(tensor, torch.Tensor) else "none"
        raise CheckpointError(f"{file}: {name}: expected {math.prod(shape)} elements ({list(shape)}), found {found}")
    return pt_tensor(name, tensor, file, files, shape)
