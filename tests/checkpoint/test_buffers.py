"""Blocks that pieces of tensors are read into."""

from __future__ import annotations

import torch

from digrap_scale.checkpoint.formats import buffers

NUMEL = buffers.SMALLEST  # float32: four times the smallest block that is kept


def test_a_block_is_used_again_once_nothing_refers_to_it() -> None:
    first = buffers.empty(NUMEL, torch.float32)
    place = first.data_ptr()
    kept = first.view(torch.uint8)[5:]  # a view keeps the storage
    kept.fill_(7)
    del first
    other = buffers.empty(NUMEL, torch.float32)
    assert other.data_ptr() != place
    other.zero_()
    assert bool((kept == 7).all())
    memory = kept.numpy().data  # and so does a memoryview of it
    del kept
    another = buffers.empty(NUMEL, torch.float32)
    assert another.data_ptr() != place
    del memory
    assert buffers.empty(NUMEL // 2, torch.bfloat16).numel() == NUMEL // 2
    assert buffers.empty(NUMEL, torch.float32).data_ptr() == place


def test_few_blocks_are_kept() -> None:
    held = [buffers.empty(NUMEL, torch.float32) for _ in range(10)]
    assert len({tensor.data_ptr() for tensor in held}) == 10
    held.clear()
    assert len(buffers._free) <= 4
    small = buffers.empty(10, torch.float16)
    assert small.shape == (10,) and small.dtype is torch.float16
