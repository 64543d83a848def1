"""Convert a published benchmark's own files to webdataset shards.

    python tools/convert_vqa.py vqav2 --questions v2_OpenEnded_mscoco_val2014_questions.json \
        --annotations v2_mscoco_val2014_annotations.json --images coco --out shards --prefix vqav2-val

docs/evaluation.md has the command for each benchmark; the formats are in digrap_scale/data/benchmarks/. A run that is killed
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.data.benchmarks.base import Sources, convert
from digrap_scale.data.benchmarks.build import BENCHMARKS
from digrap_scale.data.benchmarks.domainnet import class_prompts
from digrap_scale.errors import EXIT_OK, ConfigError, DigrapError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--annotations", type=Path, help="answers, captions, or DomainNet's list")
    parser.add_argument("--questions", type=Path, help="questions, where they have a file of their own")
    parser.add_argument("--subset", type=Path, help="list of question ids (VQA-CE)")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--prefix", help="the shards are PREFIX-000000.tar … (default: the benchmark)")
    parser.add_argument("--samples-per-shard", type=int, default=2000, help="at most (default: %(default)s)")
    parser.add_argument("--shard-mb", type=int, help="megabytes of a shard, at most; not with --longest-side")
    parser.add_argument("--processes", type=int, default=1, help="shards written at a time (default: %(default)s)")
    parser.add_argument("--longest-side", type=int, metavar="PIXELS", help="shrink larger images (JPEG)")
    parser.add_argument("--skip", action="store_true", help="count samples that cannot be converted, and go on")
    parser.add_argument("--classes-out", type=Path, metavar="FILE", help="also write data.classes (DomainNet)")
    options = parser.parse_args(arguments)
    try:
        _convert(options)
    except DigrapError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


def _convert(options: argparse.Namespace) -> None:
    if options.classes_out is not None and options.benchmark != "domainnet":
        raise ConfigError("--classes-out: only domainnet has classes; leave it out")
    if options.longest_side is not None and options.longest_side < 1:
        raise ConfigError(f"--longest-side: expected 1 or more, found {options.longest_side}")
    if options.longest_side is not None and options.shard_mb is not None:
        raise ConfigError(
            "--shard-mb: with --longest-side images have no size before they are shrunk; give --samples-per-shard"
        )
    for name, value in (("--shard-mb", options.shard_mb), ("--processes", options.processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected 1 or more, found {value}")
    converted = convert(
        BENCHMARKS[options.benchmark],
        Sources(options.images, options.annotations, options.questions, options.subset),
        options.out,
        prefix=options.prefix or options.benchmark,
        samples_per_shard=options.samples_per_shard,
        shard_bytes=None if options.shard_mb is None else options.shard_mb * 10**6,
        processes=options.processes,
        skip=options.skip,
        longest_side_pixels=options.longest_side,
    )
    if options.classes_out is not None:
        write_file(options.classes_out, json.dumps(class_prompts(options.annotations), indent=1) + "\n")
    assert converted.manifest is not None
    print(f"{converted.manifest.samples} samples in {len(converted.manifest.shards)} shard(s)")
    for kind, count in converted.skipped.items():
        print(f"skipped: {count} {kind} (first: {converted.examples[kind]})")


if __name__ == "__main__":
    sys.exit(main())
