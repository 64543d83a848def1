"""Settings for all tests: one thread a process (the runs are tiny, and several ranks share the machine), no accelerator."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# DeepSpeed's op is built anew when another ninja comes by: the one beside the interpreter, for ranks and launchers alike.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test that leaves its process group behind fails itself, not the one that comes after it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left torch.distributed initialised in the tests' own process")
