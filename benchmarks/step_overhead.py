"""What a method adds to the optimizer's step: (statistics + projection + fused AdamW) / (fused AdamW alone), in one run.

    python benchmarks/step_overhead.py                       one process
    torchrun --nproc-per-node 2 benchmarks/step_overhead.py  FSDP2 shards, one all-reduce a step

The two steps are taken in turn on the same shards, and the medians are compared, so that a machine whose speed drifts
still gives a ratio that holds. Gradients are fixed; half of the layers are in conflict and ω is set to 0.5, so that the
projection has work to do. Times mean little on shared machines: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import digrap_scale
from digrap_scale.method import DiGraP, DiGraPUpdate, Method

WIDTH = 1024


def make_model(millions: float) -> nn.Sequential:
    """Transformer-shaped parameters: 12·width² a block in four matrices, and small norms and biases between."""
    blocks = max(1, round(millions * 1e6 / (12 * WIDTH * WIDTH)))
    return nn.Sequential(*(_block() for _ in range(blocks)))


def _block() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 3 * WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 4 * WIDTH),
        nn.Linear(4 * WIDTH, WIDTH),
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_gradients(model: nn.Module) -> None:
    """Random gradients; every second layer's pulls away from the reference (conflict)."""
    torch.manual_seed(1)
    for index, parameter in enumerate(model.parameters()):
        grad = torch.randn_like(parameter) * 1e-3
        parameter.grad = grad - parameter.detach() * (1e-3 if index % 2 else -1e-3)


def median_ms(step: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Medians of ``step`` and ``other``, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 2):
        for which, action in enumerate((step, other)):
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            action()
            if round_ >= 2:  # the first ones allocate state
                times[which].append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def measure(method: Method, millions: float, rounds: int, world_size: int) -> None:
    model = make_model(millions)
    if world_size > 1:
        for block in model:
            fully_shard(block)
        fully_shard(model)
    make_gradients(model)
    parameters = list(model.parameters())
    plain = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    with_method = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    # The reference is stored as checkpoints are, in bfloat16, and lies near zero: displacement ≈ the weights.
    theta0 = {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().bfloat16() * 0.1
        for n, p in model.named_parameters()
    }
    projector = digrap_scale.attach(model, with_method, method=method, reference=theta0)
    del theta0

    def projected_step() -> None:
        if isinstance(method, DiGraP | DiGraPUpdate):
            method.omega.value_L.fill_(0.5)
        with_method.step()

    base, full = median_ms(plain.step, projected_step, rounds)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        elements = sum(local(p).numel() for p in parameters)
        extra = sum(t.numel() * t.element_size() for t in projector.held_tensors())
        print(
            f"{method.name:14s} {world_size} process(es)  {elements / 1e6:6.1f} M parameters a rank  "
            f"AdamW {base:7.1f} ms  with method {full:7.1f} ms  ratio {full / base:4.2f}  "
            f"extra memory {extra / elements:4.2f} B/parameter  conflicts {projector.report.conflict_rate:.0%}",
            flush=True,
        )
    projector.detach()


def measure_copy(millions: float) -> None:
    """Bytes/s of a plain copy: what memory gives."""
    source = torch.randn(int(millions * 1e6))
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    print(f"plain copy: {2 * source.numel() * 4 / best / 1e9:.1f} GB/s", flush=True)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="parameters, in millions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind (default: %(default)s)")
    options = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if int(os.environ.get("RANK", "0")) == 0:
        measure_copy(options.millions)
    for method in (DiGraP(strength_lr=1e-2), DiGraPUpdate(strength_lr=1e-2)):
        measure(method, options.millions, options.rounds, world_size)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
