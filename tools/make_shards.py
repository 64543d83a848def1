"""Make webdataset shards from an image folder, LLaVA's JSON, or a Hugging Face dataset on disk.

    python tools/make_shards.py folder photos/ --out shards --prefix photos-train --classes-out shards/classes.json
    python tools/make_shards.py llava llava_v1_5_mix665k.json --images data/ --out shards --prefix llava --processes 8
    python tools/make_shards.py hf data/beans/train --image-column image --out shards --prefix beans-train

A run that is killed goes on where it stopped. For published benchmarks (VQA v2, COCO captions, …) there is
tools/convert_vqa.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digrap_scale.checkpoint.atomic import write_file
from digrap_scale.data.hugging_face import list_hugging_face
from digrap_scale.data.listing import class_names, list_folder, list_llava
from digrap_scale.data.make import make_shards
from digrap_scale.data.order import permutation
from digrap_scale.errors import EXIT_OK, ConfigError, DigrapError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("folder", "llava", "hf"))
    parser.add_argument("source", type=Path, help="the folder, or LLaVA's JSON file")
    parser.add_argument("--images", type=Path, help="llava: folder of the images (default: the file's own)")
    columns = "hf: columns of images, or of lists of images (default: image)"
    parser.add_argument("--image-column", nargs="+", default=["image"], metavar="NAME", help=columns)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--prefix", required=True, help="the shards are PREFIX-000000.tar …")
    parser.add_argument("--classes-out", type=Path, metavar="FILE", help="also write data.classes: the labels, sorted")
    parser.add_argument("--samples-per-shard", type=int, default=5000, help="at most (default: %(default)s)")
    parser.add_argument("--shard-mb", type=int, help="folder, llava: megabytes of a shard, at most")
    parser.add_argument("--processes", type=int, default=1, help="shards written at a time (default: %(default)s)")
    parser.add_argument("--in-order", action="store_true", help="keep the source's order (default: shuffled)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used, and tell of it")
    options = parser.parse_args(arguments)
    try:
        _make(options)
    except DigrapError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


def _make(options: argparse.Namespace) -> None:
    if options.kind == "hf" and options.shard_mb is not None:
        raise ConfigError("--shard-mb: a dataset's images have no size before they are read; give --samples-per-shard")
    limits = (options.samples_per_shard, options.shard_mb, options.processes)
    if any(limit is not None and limit < 1 for limit in limits):
        raise ConfigError("--samples-per-shard, --shard-mb, --processes: expected 1 or more")
    if options.kind == "folder":
        items, problems = list_folder(options.source)
    elif options.kind == "llava":
        items, problems = list_llava(options.source, options.images or options.source.parent)
    else:
        items, problems = list_hugging_face(options.source, options.image_column)
    if problems and not options.skip_bad:
        raise ConfigError([*problems[:50], f"{len(problems)} problems; --skip-bad leaves these out"])
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    names = None if options.classes_out is None else class_names(items)
    if not options.in_order:  # training shuffles among neighbours: sorted shards would give batches of one class
        items = [items[i] for i in permutation(f"make-shards/{options.prefix}", len(items))]
    made = make_shards(
        items,
        options.out,
        prefix=options.prefix,
        samples_per_shard=options.samples_per_shard,
        shard_bytes=None if options.shard_mb is None else options.shard_mb * 10**6,
        processes=options.processes,
        skip=options.skip_bad,
    )
    for line in made.left_out:
        print(f"left out: {line}", file=sys.stderr)
    manifest = made.manifest
    print(f"{options.out}/{options.prefix}.manifest.json: {manifest.samples} samples in {len(manifest.shards)} shards")
    if names is not None:
        write_file(options.classes_out, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
        print(f"{options.classes_out}: {len(names)} classes")


if __name__ == "__main__":
    sys.exit(main())
