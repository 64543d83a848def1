"""What a step of DiGraP costs on many GPUs, from bytes, collectives and latencies: a written model, not a measurement.

    python benchmarks/cost_model.py --billions 3 --layers 600
    python benchmarks/cost_model.py --shard-gpus 8              HSDP: a copy of the weights for every 8 GPUs

docs/scaling.md says what each assumption is and where it could be checked. Change an assumption by its option.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

LARGE, PACK = (
    1 << 21,
    1 << 23,
)  # digrap_scale.method.kernels: elements of a layer by itself, and of a pack of small ones
PACK_LAUNCHES_US = 25 * 5  # eager operations on a pack
PACK_BYTES = 2.5  # packing writes every operand once more and reads it again

# Bytes moved a parameter in float32 masters, bfloat16 reference.
ADAM = 28  # read g, θ, m, v; write θ, m, v
STATISTICS = 18  # read g, θ, θ₀, m, v
STATISTICS_STORED = 14  # read g, θ, θ₀, θ_{t-2}
PROJECTION = 14  # read g, θ, θ₀; write g
FUSED_EXTRA = 2  # θ₀, in AdamW's own pass
KEEP = 8  # the update form keeps the weights before the step: read, written
UPDATE = 10  # and reads θ, θ_{t-1}, θ₀ after it
UPDATE_PROJECTION = 14  # read θ, θ_{t-1}, θ₀; write θ
REFERENCE = 2  # a streamed reference, from the file system


@dataclass(frozen=True)
class Machine:
    """Assumptions.

    Attributes:
        memory_gb_s: what a kernel gets of a GPU's memory.
        host_us: the host's own time for one layer: its view, its places in lists.
        launch_us: the host's time for one large layer's kernel (a compiled call, guards included).
        hop_us: latency of one hop of an all-reduce, between hosts.
        gpus_per_host: hops inside a host cost a tenth.
        conflicts: share of parameters in layers that are in conflict.
        storage_gb_s: what one GPU's process reads from the file system.
        buffer_bytes: of a streamed reference, read while forward and backward run.
        shard_gpus: GPUs that share one copy of the weights (HSDP), 0 for all.
    """

    memory_gb_s: float
    host_us: float
    launch_us: float
    hop_us: float
    gpus_per_host: int
    conflicts: float
    storage_gb_s: float
    buffer_bytes: float
    shard_gpus: int


def step_ms(parameters: float, layers: int, gpus: int, machine: Machine, form: str) -> dict[str, float]:
    """Milliseconds a step on one GPU: what AdamW takes, what DiGraP adds by kind, and bytes that cross ranks."""
    ranks = min(gpus, machine.shard_gpus or gpus)  # statistics are summed over those that share a copy
    local = parameters / ranks
    packed = local / layers < LARGE

    def pass_ms(bytes_a_parameter: float) -> float:
        return local * bytes_a_parameter / (machine.memory_gb_s * 1e9) * 1e3 * (PACK_BYTES if packed else 1.0)

    # A pass takes as long as its bytes or its launches, whichever is longer: one kernel a layer, or a few a pack.
    launches = math.ceil(local / PACK) * PACK_LAUNCHES_US / 1e3 if packed else layers * machine.launch_us / 1e3

    def walk_ms(bytes_a_parameter: float, share: float = 1.0) -> float:
        return max(pass_ms(bytes_a_parameter * share), launches * share)

    host = layers * machine.host_us / 1e3
    hosts = max(1, ranks // machine.gpus_per_host)
    hops_us = (
        2 * (math.log2(hosts) + 0.1 * math.log2(min(ranks, machine.gpus_per_host))) * machine.hop_us if ranks > 1 else 0
    )
    reduce_ms = hops_us / 1e3 + layers * 32 * 2 / 25e9 * 1e3  # a tree; 25 GB/s between hosts
    adam = local * ADAM / (machine.memory_gb_s * 1e9) * 1e3
    statistics = walk_ms(STATISTICS)
    separate = statistics + walk_ms(PROJECTION, machine.conflicts)
    if form == "separate":
        added = separate
    elif form == "stream":
        added = separate + _stream(local, machine)
    elif form == "update":
        before = max(pass_ms(STATISTICS_STORED + KEEP), 2 * launches)
        after = walk_ms(UPDATE) + walk_ms(UPDATE_PROJECTION, machine.conflicts)
        added = before + after + reduce_ms  # and a second all-reduce, of half the size
    elif form == "fused":
        added = statistics + _fused(adam, walk_ms, machine.conflicts, packed)
    else:  # backward: large layers' statistics are hidden
        added = (statistics if packed else 0.0) + _fused(adam, walk_ms, machine.conflicts, packed)
    return {"adam": adam, "added": added + host + reduce_ms, "reduce": reduce_ms, "bytes": layers * 32.0}


def _stream(local: float, machine: Machine) -> float:
    """Reads that the step waits for: all but what the buffer takes while backward runs; layers in conflict are read twice."""
    waited = REFERENCE * local * (1 + machine.conflicts) - min(machine.buffer_bytes, REFERENCE * local)
    return waited / (machine.storage_gb_s * 1e9) * 1e3


def _fused(adam: float, walk_ms: Callable[..., float], conflicts: float, packed: bool) -> float:
    """What the fused step takes beyond AdamW's: small layers are projected in packs, then stepped by torch's kernel."""
    if packed:
        return walk_ms(PROJECTION, conflicts)
    return walk_ms(ADAM + FUSED_EXTRA * conflicts) - adam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=3.0, help="trained parameters (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=600, help="tensors (default: %(default)s)")
    parser.add_argument("--memory-gb-s", type=float, default=1600.0, help="(default: %(default)s)")
    parser.add_argument("--host-us", type=float, default=25.0, help="(default: %(default)s)")
    parser.add_argument("--launch-us", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument("--hop-us", type=float, default=15.0, help="(default: %(default)s)")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--conflicts", type=float, default=0.5, help="(default: %(default)s)")
    parser.add_argument("--storage-gb-s", type=float, default=2.0, help="(default: %(default)s)")
    parser.add_argument("--buffer-mib", type=float, default=256.0, help="(default: %(default)s)")
    parser.add_argument("--shard-gpus", type=int, default=0, help="GPUs that share one copy, 0 for all (HSDP)")
    parser.add_argument("--tokens-per-gpu", type=float, default=8192, help="tokens of one step (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=250.0, help="that training reaches (default: %(default)s)")
    options = parser.parse_args()
    machine = Machine(
        options.memory_gb_s,
        options.host_us,
        options.launch_us,
        options.hop_us,
        options.gpus_per_host,
        options.conflicts,
        options.storage_gb_s,
        options.buffer_mib * (1 << 20),
        options.shard_gpus,
    )
    compute_ms = 6 * options.billions * 1e9 * options.tokens_per_gpu / (options.tflops * 1e12) * 1e3
    print(f"{options.billions:g} B parameters, {options.layers} layers, forward and backward {compute_ms:.0f} ms\n")
    forms = ("separate", "fused", "backward", "update", "stream")
    print(f"| GPUs | AdamW ms | {' | '.join(f'{form} + ms' for form in forms)} | all-reduce ms | of a step, separate |")
    print("|--:" * (len(forms) + 4) + "|")
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        rows = {form: step_ms(options.billions * 1e9, options.layers, gpus, machine, form) for form in forms}
        adam = rows["separate"]["adam"]
        share = rows["separate"]["added"] / (compute_ms + adam)
        cells = [f"{adam:.2f}", *(f"{rows[form]['added']:.2f}" for form in forms), f"{rows['separate']['reduce']:.2f}"]
        print(f"| {gpus} | {' | '.join(cells)} | {100 * share:.1f} % |")


if __name__ == "__main__":
    main()
