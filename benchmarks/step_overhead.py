"""What a method adds to the optimizer's step, as a ratio to torch's fused AdamW on the same shards in the same run.

    python benchmarks/step_overhead.py                       one process
    torchrun --nproc-per-node 2 benchmarks/step_overhead.py  FSDP2 shards, one all-reduce a step
    python benchmarks/step_overhead.py --layers 5000         the same parameters in many small layers

Cases:
    separate   gradients are changed in place, then any optimizer steps
    fused      AdamW's step taken in the hook, with the projection in the same pass
    backward   fused, and the statistics are taken before the clock starts, as they are while backward runs
    stream     separate, with the reference read from its file in each step
    update     digrap_update: acts on AdamW's whole step
    naive      DiGraP as research code writes it, a parameter and a tensor operation after the other (one process)

The plain step and the step with the method are taken in turn on the same weights, gradients and moments, and the medians
are compared, so that a machine whose speed drifts still gives a ratio that holds. Half of the layers are in conflict and ω
is set to 0.5, so that the projection has work to do. GB/s counts the bytes that a step must move. The floor is AdamW's own
time and a plain read (a sum, taken in turn with the steps) of as many bytes as the method must read beside it. Read the
ratios; times mean little on a shared machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from yardsticks import NaiveDiGraP, copy_gigabytes_per_second, read_gigabytes_per_second, seconds

import digrap_scale

WIDTH = 1024
ADAM_BYTES, STATISTICS_BYTES, PROJECTION_BYTES = 28, 18, 14  # a parameter: read and written
PROJECTION_READS, FUSED_READS = 10, 2  # of a parameter in conflict: g, θ, θ₀; θ₀ alone, in AdamW's pass
CASES = ("separate", "fused", "backward", "stream", "update", "naive")


class Flat(nn.Module):
    """Equal layers of one vector each."""

    def __init__(self, layers: int, elements: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(elements // layers)) for _ in range(layers))


def make_model(millions: float, layers: int | None) -> nn.Module:
    """Transformer-shaped parameters, 12·width² a block in four matrices with norms and biases; or equal layers."""
    if layers is not None:
        return Flat(layers, int(millions * 1e6))
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
    """Random gradients; every second module's weight and bias pull away from the reference (conflict)."""
    torch.manual_seed(1)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        parameter.grad.add_(parameter.detach(), alpha=-1e-3 if index // 2 % 2 else 1e-3)


def alternate(
    plain: Callable[[], None], other: Callable[[], float], read: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of the three, taken in turn; ``other`` times itself. The first rounds compile and allocate."""
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(rounds + 2):
        for kept, action in zip(times, (lambda: seconds(plain), other, lambda: seconds(read)), strict=True):
            if dist.is_initialized():
                dist.barrier()
            kept.append(action())
    base, full, reading = (statistics.median(kept[2:]) for kept in times)
    return base, full, reading


def measure(
    case: str, model: nn.Module, reference: Path, rounds: int, world_size: int, kernels: str, plain_read: torch.Tensor
) -> None:
    make_gradients(model)
    parameters = list(model.parameters())
    with_method = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    plain = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    plain.state = with_method.state  # one set of moments for both
    if case == "naive":
        naive = NaiveDiGraP(parameters, lr=1e-5, strength_lr=1e-2)
        base, full, _ = alternate(lambda: _step(plain), lambda: seconds(naive.step), plain_read.sum, rounds)
        report(case, world_size, parameters, base, full, None, None, "")
        return
    projector = digrap_scale.attach(
        model,
        with_method,
        method="digrap_update" if case == "update" else "digrap",
        reference=reference,
        reference_placement="stream" if case == "stream" else "device",
        projection="fused" if case in ("fused", "backward") else "separate",
        statistics="backward" if case == "backward" else "step",
        kernels=kernels,
    )

    def step() -> float:
        projector.method.omega.value_L.fill_(0.5)
        if projector._early is not None:
            for layer in range(len(parameters)):
                projector._early._gradient_is_there(layer)
        return seconds(with_method.step)

    base, full, reading = alternate(lambda: _step(plain), step, plain_read.sum, rounds)
    sizes_L = torch.tensor([local(p).numel() for p in parameters])
    elements = int(sizes_L.sum())
    conflicts = float(sizes_L[projector.method.conflict().cpu()].sum()) / elements
    moved = {
        "fused": STATISTICS_BYTES + ADAM_BYTES + 2 * conflicts,
        "backward": ADAM_BYTES + 2 * conflicts,
        "separate": STATISTICS_BYTES + PROJECTION_BYTES * conflicts + ADAM_BYTES,
    }.get(case)
    reads = {
        "fused": STATISTICS_BYTES + FUSED_READS * conflicts,
        "backward": FUSED_READS * conflicts,
        "separate": STATISTICS_BYTES + PROJECTION_READS * conflicts,
    }.get(case)
    bytes_per_second = plain_read.numel() * plain_read.element_size() / reading
    floor = None if reads is None else 1 + reads * elements / bytes_per_second / base
    extra = sum(t.numel() * t.element_size() for t in projector.held_tensors()) / elements
    notes = f"{projector.method.kernels.name} kernels, extra memory {extra:4.2f} B, conflicts {conflicts:.0%}"
    report(case, world_size, parameters, base, full, moved, floor, notes)
    projector.detach()


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def report(
    case: str,
    world_size: int,
    parameters: list[nn.Parameter],
    base: float,
    full: float,
    moved: float | None,
    floor: float | None,
    notes: str,
) -> None:
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    elements = sum(local(p).numel() for p in parameters)
    speed = "" if moved is None else f"{moved * elements / full / 1e9:5.1f} GB/s"
    bound = "" if floor is None else f"(floor {floor:4.2f})"
    print(
        f"{case:9s} ratio {full / base:5.2f} {bound:12s}  "
        f"AdamW {base * 1e3:7.1f} ms ({ADAM_BYTES * elements / base / 1e9:4.1f} GB/s)  "
        f"with method {full * 1e3:7.1f} ms {speed:11s}  {world_size} process(es), {len(parameters)} layers, "
        f"{elements / 1e6:.1f} M parameters each  {notes}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="parameters, in millions (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=None, help="equal layers instead of transformer blocks")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="(default: all)")
    parser.add_argument(
        "--kernels", default="auto", choices=("auto", "native", "compile", "eager"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        dist.init_process_group()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    size = min(int(options.millions * 1e6) // world_size, 100_000_000)
    copy, read = copy_gigabytes_per_second(size), read_gigabytes_per_second(size)  # all ranks at once, as in a step
    plain_read = torch.ones(size)
    if rank == 0:
        print(f"plain copy {copy:.1f} GB/s, plain read {read:.1f} GB/s", flush=True)
    torch.manual_seed(0)
    model = make_model(options.millions, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        # Stored as checkpoints are, in bfloat16, and near zero: displacement ≈ the weights. Ranks may sit on several hosts.
        save_file(
            {n: (p.detach() * 0.1).bfloat16() for n, p in model.named_parameters()}, f"{folder}/model.safetensors"
        )
        if world_size > 1:
            for block in model.children():
                fully_shard(block)
            fully_shard(model)
        for case in options.cases:
            if case != "naive" or world_size == 1:
                measure(case, model, Path(folder), options.rounds, world_size, options.kernels, plain_read)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
