"""A reference that stays in its file: the numbers of a resident one, through a buffer that does not grow."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import digrap_scale
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.reference.stream import StreamedReference, find_source
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")
MIB = 1 << 20


def stream_of(
    folder: Path, tensors: dict[str, torch.Tensor], buffer_bytes: int = MIB, part: slice | None = None
) -> Any:
    """All of ``tensors`` (or elements ``part`` of each), and one layer more that has no reference."""
    save_file(tensors, folder / "model.safetensors")
    reader = SafetensorsReader(folder)
    start, stop = (None, None) if part is None else (part.start, part.stop)
    sources = [find_source(reader, n, start or 0, t.numel() if stop is None else stop) for n, t in tensors.items()]
    return StreamedReference([*sources, None], [torch.float32] * (len(tensors) + 1), buffer_bytes, CPU)


def collect(reference: StreamedReference, layers: list[int], sizes: dict[int, int]) -> dict[int, torch.Tensor]:
    """Every layer put together from its pieces; each element must come exactly once."""
    whole = {layer: torch.full((sizes[layer],), torch.nan) for layer in layers if layer in sizes}
    for portion in reference.pieces(layers):
        for piece in portion:
            if piece.reference is None:
                assert piece.layer not in sizes
                continue
            target = whole[piece.layer][piece.part]
            assert torch.isnan(target).all(), "an element came twice"
            target.copy_(piece.reference)
    return whole


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (3, 5), "large": (900, 1024), "b": (17,), "half": (700, 512), "c": (1,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors["half"] = tensors["half"].bfloat16()
    return tensors


def test_every_element_comes_once(tmp_path: Path) -> None:
    tensors = make_tensors()
    reference = stream_of(tmp_path, tensors)
    sizes = {layer: tensor.numel() for layer, tensor in enumerate(tensors.values())}
    everything = list(range(len(tensors) + 1))
    for layers in (everything, everything, [1, 3], [4, 5], []):
        got = collect(reference, layers, sizes)
        for layer, tensor in enumerate(tensors.values()):
            assert layer not in got or torch.equal(got[layer], tensor.reshape(-1).float())
        reference.prefetch()
    assert sum(t.numel() * t.element_size() for t in reference.held_tensors()) <= MIB
    reference.close()


def test_slices(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(1000, 700), "y": torch.randn(700, 1000).to(torch.float16)}
    part = slice(123_457, 600_001)
    reference = stream_of(tmp_path, tensors, part=part)
    got = collect(reference, [0, 1, 2], {0: part.stop - part.start, 1: part.stop - part.start})
    for layer, tensor in enumerate(tensors.values()):
        assert torch.equal(got[layer], tensor.reshape(-1)[part].float())


def test_read_ahead_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps the first portions are read; the step then reads only what follows. On another thread."""
    tensors = make_tensors()
    reference = stream_of(tmp_path, tensors)
    read: list[tuple[int, int]] = []
    original = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append((threading.get_ident(), len(buffers[0])))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    sizes = {layer: tensor.numel() for layer, tensor in enumerate(tensors.values())}
    everything = list(range(len(tensors) + 1))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    collect(reference, everything, sizes)
    assert sum(size for _, size in read) == total
    read.clear()
    reference.prefetch()
    reference.prefetch()  # once is enough
    reference._settle()
    ahead = sum(size for _, size in read)
    assert MIB // 2 < ahead <= MIB
    collect(reference, everything, sizes)
    assert sum(size for _, size in read) == total
    assert threading.get_ident() not in {thread for thread, _ in read}


def test_wider_than_the_weights_is_rounded(tmp_path: Path) -> None:
    save_file({"x": torch.randn(50_000)}, tmp_path / "model.safetensors")
    source = find_source(SafetensorsReader(tmp_path), "x", 0, 50_000)
    ((piece,),) = StreamedReference([source], [torch.bfloat16], MIB, CPU).pieces([0])
    assert piece.reference.dtype == torch.bfloat16


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 1048576 bytes or more, found 1000"):
        stream_of(tmp_path, {"x": torch.zeros(3)}, buffer_bytes=1000)
    save_file({"x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="x: expected one of F64, F32, F16, BF16, found dtype I64"):
        find_source(SafetensorsReader(tmp_path), "x", 0, 3)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    reference = stream_of(tmp_path, {"x": torch.zeros(300_000)})
    list(reference.pieces([0, 1]))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(CheckpointError, match="was written to while it is streamed"):
        list(reference.pieces([0, 1]))


def test_a_file_that_is_replaced_stays_the_reference(tmp_path: Path) -> None:
    """A new file by the same name is another file: the open one goes on."""
    reference = stream_of(tmp_path, {"x": torch.full((300_000,), 2.0)})
    save_file({"x": torch.zeros(300_000)}, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "model.safetensors")
    got = collect(reference, [0, 1], {0: 300_000})
    assert bool((got[0] == 2.0).all())


@pytest.mark.parametrize("method", ["digrap", "digrap_update", "l2sp"])
@pytest.mark.parametrize("projection", ["separate", "fused"])
def test_equals_a_resident_one(tmp_path: Path, method: str, projection: str) -> None:
    """Layers that are cut into many pieces, beside small ones."""

    def train(placement: str) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1500), nn.Tanh(), nn.Linear(1500, 600), nn.Tanh(), nn.Linear(600, 3))
        save_file(
            {n: (p.detach() * 0.9).bfloat16() for n, p in model.named_parameters()}, tmp_path / "model.safetensors"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"weight": 0.1} if method == "l2sp" else {"strength_lr": 0.05}
        projector = digrap_scale.attach(
            model,
            optimizer,
            method=method,
            reference=tmp_path,
            reference_placement=placement,
            reference_buffer_bytes=MIB,
            max_grad_norm=None if method == "l2sp" else 0.5,
            projection=projection,
            **options,
        )
        for step in range(6):
            torch.manual_seed(step)
            model(torch.randn(8, 512)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, projector

    resident, first = train("device")
    streamed, second = train("stream")
    for a, b in zip(resident.parameters(), streamed.parameters(), strict=True):
        if method == "l2sp":
            assert torch.equal(a, b), "no sum goes into it"
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert second.strength() == pytest.approx(first.strength(), abs=1e-6)
    assert second.report.grad_norm == pytest.approx(first.report.grad_norm, rel=1e-5)
    assert "(stream)" in second.summary()
    second.detach()


LAYERS, WIDTH, BUFFER = 20, 1536, 4 * MIB  # 20 × 4.5 MiB in bfloat16: 90 MiB, 45 a rank


def resident_bytes() -> int:
    """Resident memory of this process, file mappings included."""
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssAnon", "RssFile")))


def stepping(layers: int, folder: str, placement: str) -> tuple[torch.optim.Optimizer, Any]:
    """A sharded model with gradients that pull away, and its projector."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    options = {"reference_placement": placement, "reference_buffer_bytes": BUFFER}
    return optimizer, lambda: digrap_scale.attach(model, optimizer, method="pcgrad", reference=folder, **options)


def peak_growth(folder: str, warm_up: str, placement: str) -> dict[str, float]:
    """How far resident memory goes up, at most, from before the reference comes in to the end of three steps."""
    optimizer, attach = stepping(1, warm_up, placement)  # libraries and scratch memory come in
    attach()
    optimizer.step()
    optimizer, attach = stepping(LAYERS, folder, placement)
    ctypes.CDLL(None).malloc_trim(0)  # memory that is freed but kept would hide what comes in
    before = resident_bytes()
    projector = attach()
    highest, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.0005):
            highest[0] = max(highest[0], resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    for _ in range(3):
        optimizer.step()
    done.set()
    sampler.join()
    result = {"grown": float(highest[0] - before), "conflicts": projector.report.conflict_rate}
    projector.detach()
    return result


@pytest.mark.slow
def test_resident_memory_is_the_buffers(tmp_path: Path) -> None:
    """A rank's part of the file is ten times the buffer and more; a resident reference fails the same bound."""
    torch.manual_seed(0)
    file = {f"{i}.weight": torch.randn(WIDTH, WIDTH).bfloat16() for i in range(LAYERS)}
    for folder, names in (("whole", list(file)), ("one", ["0.weight"])):
        (tmp_path / folder).mkdir()
        save_file({name: file[name] for name in names}, tmp_path / folder / "model.safetensors")
    part = LAYERS * WIDTH * WIDTH * 2 / 2
    assert part >= 10 * BUFFER
    bound = BUFFER + 32 * MIB  # a dozen blocks of 2 MiB that the kernels work on, and their heap
    folders = str(tmp_path / "whole"), str(tmp_path / "one")
    streamed = run_ranks(2, tmp_path / "stream", peak_growth, *folders, "stream", start_method="spawn")
    resident = run_ranks(2, tmp_path / "cpu", peak_growth, *folders, "cpu", start_method="spawn")
    for got in streamed:
        assert got["grown"] < bound, f"{got['grown'] / MIB:.0f} MiB"
        assert got["conflicts"] > 0
    assert min(got["grown"] for got in resident) > part > bound
