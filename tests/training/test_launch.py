"""The launchers' commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from digrap_scale.training.launch import command_of


def test_each_backend_has_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command_of("zero3", 3, Path("x.yaml"))[2:5] == ["deepspeed.launcher.runner", "--num_gpus", "3"]
    assert command_of("fsdp2", 3, Path("x.yaml"))[2] == "torch.distributed.run"


def test_devices_that_are_visible_are_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher takes devices 0 to N − 1 where it is told N, and forgets the variable."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert command_of("zero3", 2, Path("x.yaml"))[2] == "torch.distributed.run"
