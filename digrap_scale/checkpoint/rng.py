"""The state of every random generator of this process, as tensors: no pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_generators() -> dict[str, torch.Tensor]:
    """Python's, NumPy's, torch's and the accelerator's generators."""
    version, words, gauss = random.getstate()
    assert version == 3
    kind, key, position, has_gauss, cached = np.random.get_state()
    assert kind == "MT19937"
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(key).astype(np.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if (module := _accelerator()) is not None:
        found["accelerator"] = module.get_rng_state()
    return found


def restore_generators(state: Mapping[str, torch.Tensor]) -> None:
    """The inverse of ``capture_generators``."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    module = _accelerator()
    if module is not None and "accelerator" in state:
        module.set_rng_state(state["accelerator"])


def _accelerator() -> Any:
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else torch.get_device_module(accelerator)
