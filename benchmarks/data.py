"""What loading costs: samples per second beside the same work without us, memory over an epoch, time to resume.

    python benchmarks/data.py speed  [--samples 4000] [--image-px 64] [--workers 0]
    python benchmarks/data.py resume [--samples 200000]
    python benchmarks/data.py memory [--samples 1000000]       # minutes, and 3 GB in the temporary folder

``speed`` takes turns on the same generated shards, and compares medians, so that a busy machine weighs on all alike:
raw (``tarfile`` alone), webdataset (its own pipeline: tar reading, grouping, then our ``decode_sample``), decode
(``decode_sample`` of samples that are in memory already, kept for a batch as any training does) and ours (the training
loader, shuffled, with a task that only counts). Large images (``--image-px 512``) are bound by decoding JPEG.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from digrap_scale.data.loader import TrainingLoader, build_training_loader
from digrap_scale.data.reading import decode_sample
from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.data.tasks.base import Task
from digrap_scale.types import Batch

BATCH_SAMPLES = 32
REPEATS = 5


class Count(Task):
    """Does nothing with its samples, so that reading and decoding are all that is measured."""

    def __init__(self) -> None:
        super().__init__(None, class_names=(), label_field="label", crop=False, dtype=torch.float32)

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        return Batch({}, torch.zeros(len(samples), dtype=torch.int64), [sample["key"] for sample in samples])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    logits = loss


def jpeg(size: int, seed: int) -> bytes:
    """A picture with something in it: smooth noise."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
    stream = io.BytesIO()
    small.resize((size, size), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def make(folder: Path, samples: int, image_px: int, samples_per_shard: int) -> ShardSet:
    """Shards of generated images; 64 different ones."""
    images = [jpeg(image_px, seed) for seed in range(64)]
    write_shards(
        (
            {"key": f"{i:08d}", "image": images[i % 64], "extension": "jpg", "meta": {"label": "x", "number": i}}
            for i in range(samples)
        ),
        folder,
        prefix="bench",
        samples_per_shard=samples_per_shard,
    )
    return ShardSet.open([f"{folder}/bench-*.tar"])


def ours(shards: ShardSet, workers: int = 0) -> TrainingLoader:
    return build_training_loader(
        shards,
        Count(),
        batch_samples=BATCH_SAMPLES,
        rank=0,
        world_size=1,
        workers=workers,
        seed=0,
        shuffle_buffer_samples=1000,
    )


class Webdataset(torch.utils.data.IterableDataset):
    """webdataset's own stages, batched."""

    def __init__(self, shards: ShardSet) -> None:
        self.urls = [{"url": str(path)} for path in shards.paths]

    def __iter__(self) -> Iterator[list[str]]:
        info = torch.utils.data.get_worker_info()
        urls = self.urls if info is None else self.urls[info.id :: info.num_workers]
        pipeline = wds.DataPipeline(
            lambda: iter(urls),
            url_opener,
            tar_file_expander,
            group_by_keys,
            wds.filters.shuffle(1000),
            wds.filters.map(decode_sample),
        )
        stream = iter(pipeline)
        while batch := list(islice(stream, BATCH_SAMPLES)):
            yield [sample["key"] for sample in batch]


def raw(shards: ShardSet) -> int:
    count = 0
    for path in shards.paths:
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                count += stream is not None and bool(stream.read()) and member.name.endswith(".json")
    return count


def drain(batches: Iterable[Any], samples: int) -> int:
    """Takes ``samples`` samples in batches."""
    return sum(BATCH_SAMPLES for _ in islice(batches, samples // BATCH_SAMPLES))


def decode_only(shards: ShardSet) -> Callable[[], int]:
    reader = ours(shards)._batches.sources.reader()
    held = [reader.read(0, index) for index in range(min(1000, shards.counts[0]))]

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in range(0, shards.samples, BATCH_SAMPLES):
            yield [decode_sample(held[i % len(held)]) for i in range(start, start + BATCH_SAMPLES)]

    def run() -> int:
        return drain(batches(), shards.samples)

    return run


def speed(options: argparse.Namespace, folder: Path) -> None:
    shards = make(folder, options.samples, options.image_px, samples_per_shard=1000)
    runs: dict[str, Callable[[], int]] = {"raw": lambda: raw(shards)}
    runs["webdataset"] = lambda: drain(
        DataLoader(Webdataset(shards), batch_size=None, num_workers=options.workers), shards.samples
    )
    runs["decode"] = decode_only(shards)
    runs["ours"] = lambda: drain(ours(shards, options.workers), shards.samples)
    # One process's own time is that of the work alone, however busy the machine is; workers' is only on the wall.
    clock = time.perf_counter if options.workers else time.process_time
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            start = clock()
            count = run()
            if turn:  # the first turn fills the page cache
                times[name].append((clock() - start) / count)
    rates = {name: 1 / statistics.median(of) for name, of in times.items()}
    size = sum(path.stat().st_size for path in shards.paths) / shards.samples
    print(
        f"{shards.samples} samples of {size:.0f} bytes, {options.image_px} px, {options.workers} workers, {clock.__name__}"
    )
    for name, rate in rates.items():
        print(f"{name:>11}: {rate:8.0f} samples/s")
    of_webdataset = statistics.median(w / o for w, o in zip(times["webdataset"], times["ours"], strict=True))
    of_decode = statistics.median(d / o for d, o in zip(times["decode"], times["ours"], strict=True))
    print(f"ours: {of_webdataset:.0%} of webdataset, {of_decode:.0%} of decoding alone (medians of {REPEATS} turns)")


def resume(options: argparse.Namespace, folder: Path) -> None:
    shards = make(folder, options.samples, 16, samples_per_shard=10_000)
    state = ours(shards).state_dict()
    print(f"{shards.samples} samples in {len(shards.paths)} shards: from load_state_dict to the first batch")
    for position in (0, 0.25, 0.5, 0.75, 0.99):
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            loader = ours(ShardSet.open([str(path) for path in shards.paths]))
            loader.load_state_dict({**state, "position": int(position * shards.samples)})
            next(iter(loader))
            taken.append(time.perf_counter() - start)
        print(f"{position:>6.0%} of the epoch: {statistics.median(taken) * 1e3:6.1f} ms")


def memory(options: argparse.Namespace, folder: Path) -> None:
    start = time.perf_counter()
    writer = multiprocessing.get_context("spawn").Process(target=make, args=(folder, options.samples, 16, 10_000))
    writer.start()  # in a process of its own: what writing needs is not what reading needs
    writer.join()
    shards = ShardSet.open([f"{folder}/bench-*.tar"])
    print(f"{shards.samples} samples in {len(shards.paths)} shards written in {time.perf_counter() - start:.0f} s")
    loader, start = ours(shards), time.process_time()
    for batch, _ in enumerate(islice(loader, len(loader)), start=1):
        if batch == 100 or batch % (len(loader) // 10) == 0:
            own, mapped = memory_mb()
            rate = batch * BATCH_SAMPLES / (time.process_time() - start)
            files = len(os.listdir("/proc/self/fd"))
            print(
                f"{batch / len(loader):>5.0%}: {own:.1f} MB of its own, {mapped:.1f} MB mapped files, {files} open files, "
                f"{rate:.0f} samples/s of CPU time",
                flush=True,
            )


def memory_mb() -> tuple[float, float]:
    """This process's own resident memory, and that of files mapped into it, which all processes share (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "resume", "memory"))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--image-px", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    options.samples = options.samples or {"speed": 4000, "resume": 200_000, "memory": 1_000_000}[options.what]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "resume": resume, "memory": memory}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()
