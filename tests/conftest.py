"""Settings for all tests: one thread a process (the runs are tiny, and several ranks share the machine), no accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test that leaves its process group behind fails itself, not the one that comes after it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left torch.distributed initialised in the tests' own process")
