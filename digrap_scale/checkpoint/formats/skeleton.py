"""PyTorch's ``.pt`` files written before their data: everything but the tensors' bytes, whose places are known then.

Public parts of PyTorch: ``torch.serialization.skip_data`` reserves the room, and a load without data tells the offsets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from digrap_scale.checkpoint.safe_pickle import load_pt


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that takes no memory, to be put into the content of ``save_skeleton``."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def save_skeleton(content: Any, file: Path) -> Any:
    """Writes ``content`` without the data of its tensors (holes in the file).

    Returns:
        The content as it will be loaded; ``pt_offset`` tells where a tensor's data go.
    """
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, file)
    return load_pt(file, data=False)
