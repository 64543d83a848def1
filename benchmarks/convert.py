"""Conversion's speed against copying the same bytes, and its peak memory.

    python benchmarks/convert.py                       4 GiB of bfloat16 weights, every conversion twice
    python benchmarks/convert.py --gigabytes 16 --folder /scratch

Each conversion runs in a process of its own (peak memory: VmHWM; "before": resident size as it begins). A copy of its output
(read, write, fsync, in pieces of 32 MiB) is timed right after it; where the source is larger than the output, a read of the
difference belongs to the copy, since a conversion has to read its source. The ratio of the two is the figure, as both share
the machine's mood; the ratio of their CPU seconds is steadier on a busy one. Limits asked for: 2 × the largest tensor + 512 MiB,
and 0.7 of a copy's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import multiprocessing

from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.save import Contents, Saver
from digrap_scale.config.schema import CheckpointConfig
from digrap_scale.types import TensorPart

LARGEST = 512 << 20
PIECE = 32 << 20
OURS = "run/checkpoints/step-1"
RUNS = [  # name, source, options; later ones read what earlier ones wrote
    ("safetensors → safetensors", "source", {"to": "safetensors"}),
    ("safetensors → safetensors, float32", "source", {"to": "safetensors", "dtype": "float32"}),
    ("safetensors → dcp, 8 ranks", "source", {"to": "dcp", "world_size": 8}),
    ("safetensors → zero, 8 ranks", "source", {"to": "zero", "world_size": 8}),
    ("dcp → safetensors", "safetensors → dcp, 8 ranks", {"to": "safetensors"}),
    ("zero → safetensors, bfloat16", "safetensors → zero, 8 ranks", {"to": "safetensors", "dtype": "bfloat16"}),
    # A run's own: what is read is hashed first.
    ("a run's, 4 ranks → safetensors", OURS, {"to": "safetensors"}),
    ("zero, 8 ranks → zero, 3 ranks", "safetensors → zero, 8 ranks", {"to": "zero", "world_size": 3}),
]
WORKER = """
import json, sys, time
from digrap_scale.checkpoint.convert import convert
def size(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
source, out, options = json.loads(sys.argv[1])
before = size("VmRSS")
start, start_cpu = time.perf_counter(), time.process_time()
convert(source, out, **options)
times = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
print(json.dumps({**times, "before": before, "peak": size("VmHWM")}))
"""


def make(folder: Path, gigabytes: float) -> None:
    """One tensor of 512 MiB, the rest of 64 MiB, in files of up to 2 GiB."""
    sizes = [LARGEST, *[64 << 20] * max(0, int((gigabytes * 2**30 - LARGEST) / (64 << 20)))]
    folder.mkdir()
    index: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    for number, size in enumerate(sizes):
        held[f"layers.{number}.weight"] = torch.randint(0, 1 << 15, (size // 8192, 4096), dtype=torch.int16).view(
            torch.bfloat16
        )
        if sum(tensor.nbytes for tensor in held.values()) >= 2 << 30 or number + 1 == len(sizes):
            file = f"model-{number:05d}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(held, file))
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_ours(rank: int, ranks: int, source: Path, run: Path, store: str) -> None:
    """A run's checkpoint of the same weights with two moments, as ``ranks`` processes write it; this is one of them."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parts, names = [], []
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                whole = opened.get_tensor(name)
                names.append(name)
                cut = whole.numel() // ranks
                start, stop = rank * cut, whole.numel() if rank == ranks - 1 else (rank + 1) * cut
                flat = whole.view(-1)[start:stop].clone()
                keys = (f"model.{name}", *(f"optimizer.state.{name}.{key}" for key in ("exp_avg", "exp_avg_sq")))
                parts += [TensorPart(key, tuple(whole.shape), start, stop, flat) for key in keys]
    saver = Saver(run, CheckpointConfig(), Ranks(rank, ranks, dist.group.WORLD), lambda _: None)
    state = {"format": 1, "step": 1, "world_size": ranks, "trained": names, "frozen": [], "buffers": [], "tied": {}}
    saver.save(Contents(1, state, "", parts, {"x": torch.zeros(1)}, {}, {"x": torch.zeros(1)}, lambda folder: None))
    saver.close()
    dist.destroy_process_group()


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def copy(source: Path, target: Path, also_read: list[Path], more: int) -> dict[str, float]:
    """Copies a folder, and reads ``more`` bytes of other files."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for path in files_of(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, place.open("wb") as write:
            shutil.copyfileobj(read, write, PIECE)
            write.flush()
            os.fsync(write.fileno())
    piece = bytearray(PIECE)
    for path in also_read:
        with path.open("rb") as read:
            while more > 0 and (count := read.readinto(piece)):
                more -= count
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="conversions whose name has this text (and needs no other's output)")
    parser.add_argument("--folder", help="where to write (about 8 × the weights; default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder / "source", options.gigabytes)
        multiprocessing.spawn(make_ours, (4, folder / "source", folder / "run", str(folder / "store")), nprocs=4)
        kept = {source for _, source, _ in RUNS}
        print(f"{'':36} {'written':>9} {'time':>7} {'of a copy':>10} {'in CPU':>8} {'before':>8} {'peak':>8}")
        for title, source, arguments in RUNS:
            if options.only not in title:
                continue
            results = []
            ratios: dict[str, list[float]] = {"seconds": [], "cpu": []}
            for _ in range(options.repeats):
                out = folder / title
                shutil.rmtree(out, ignore_errors=True)
                task = json.dumps([str(folder / source), str(out), arguments])
                done = subprocess.run([sys.executable, "-c", WORKER, task], check=True, stdout=subprocess.PIPE)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                more = size_of(folder / source) - size_of(out)
                for key, value in copy(out, folder / "copy", files_of(folder / source), more).items():
                    ratios[key].append(value / results[-1][key])
                shutil.rmtree(folder / "copy")
            size = size_of(out)
            seconds = statistics.median(result["seconds"] for result in results)
            speed, cpu = (statistics.median(values) for values in ratios.values())
            before, peak = (max(result[key] for result in results) for key in ("before", "peak"))
            print(
                f"{title:36} {size / 2**30:5.1f} GiB {seconds:6.1f}s {speed:10.2f} {cpu:8.2f} "
                f"{before >> 20:4d} MiB {peak >> 20:4d} MiB",
                flush=True,
            )
            if title not in kept:
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
