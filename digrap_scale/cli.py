"""The command line: ``digrap-scale VERB …``, alone or under a launcher."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from digrap_scale.config import Config, load_config
from digrap_scale.errors import EXIT_OK, ConfigError, DigrapError, complain
from digrap_scale.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; errors become one line (or one a problem) and the exit code of their kind."""
    options = _parse(arguments)
    _quiet_libraries()
    try:
        options.run(options)
    except DigrapError as error:
        complain(error)
        return error.exit_code
    return EXIT_OK


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between or before the overrides; argparse alone leaves overrides after an option over."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="digrap-scale", description="Robust fine-tuning on sharded gradients.")
    parser.add_argument("--version", action="version", version=f"digrap-scale {__version__}")
    # DeepSpeed's launcher passes it to every process; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def config_verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = verb(name, run, text)
        added.add_argument("config", help="YAML file of the run")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of the file's values")
        return added

    train = config_verb("train", _train, "train, save and evaluate a run")
    train.add_argument("--dry-run", type=int, metavar="N", help="take N steps, tell time and memory, and write nothing")
    train.add_argument(
        "--world-size",
        type=int,
        help="of a dry run in one process: imagine a job of so many (default: 1, or the launcher's)",
    )
    evaluate = config_verb("evaluate", _evaluate, "print the suite's ID/OOD table")
    evaluate.add_argument("--weights", help="folder of the weights, such as a run's final/ (default: model.path)")
    checked = config_verb(
        "validate", _validate, "show all errors of the config and of the data's first samples; trains nothing"
    )
    checked.add_argument("--world-size", type=int, help="processes of the job (default: the launcher's, or 1)")
    planned = config_verb(
        "plan", _plan, "memory of each rank and communication of a step; loads no weights, needs no GPU"
    )
    planned.add_argument("--world-size", type=int, required=True, help="processes of the job")
    planned.add_argument("--device-memory", metavar="BYTES", help="of each device, such as 80GiB: tells what fits")
    interpolate = verb("interpolate", _interpolate, "WiSE-FT: (1 − α)·A + α·B, streamed tensor by tensor")
    interpolate.add_argument("a", help="pre-trained weights (folder or safetensors)")
    interpolate.add_argument("b", help="fine-tuned model's folder")
    interpolate.add_argument("out", help="folder to write (with several alphas: their parent)")
    interpolate.add_argument("--alpha", type=float, nargs="+", default=[0.5], help="weights of B in [0, 1]")
    index = verb("index", _index, "write, or check, the manifest of shards: counts, checksums, where each sample lies")
    index.add_argument("shards", nargs="+", help="shard files or patterns of one folder (with --check: of any)")
    index.add_argument(
        "--check", action="store_true", help="read every byte and compare with the manifests; writes nothing"
    )
    index.add_argument("--skip-bad", action="store_true", help="leave out broken samples, and tell which")
    index.add_argument("--name", help="of the manifest (default: what the files' names have in common)")
    index.add_argument("--processes", type=int, default=1, help="shards read at a time (default: %(default)s)")
    convert = verb("convert", _convert, "a checkpoint of any known format into another, streamed")
    convert.add_argument(
        "source", help="checkpoint: ours, DeepSpeed's (ZeRO, universal), DCP, Hugging Face, PEFT adapter"
    )
    convert.add_argument("out", help="folder to write")
    convert.add_argument("--to", required=True, help="safetensors, dcp or zero (ZeRO-3)")
    convert.add_argument("--world-size", type=int, help="ranks to write for (zero: needed; dcp: files)")
    convert.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    convert.add_argument(
        "--merge-adapter",
        metavar="BASE",
        nargs="?",
        const="",
        help="the source is a LoRA adapter: merge it into BASE; without BASE: a training checkpoint that holds both",
    )
    convert.add_argument("--companions", help="folder whose config, processor and tokenizer files go with the weights")
    convert.add_argument("--max-shard-bytes", type=int, default=4 << 30, help="largest safetensors file")
    convert.add_argument("--verify", action="store_true", help="read the result again and compare hashes")
    diff = verb("diff", _diff, "how far two checkpoints are apart, per tensor or layer")
    diff.add_argument("a", help="checkpoint of any known format, such as the pre-trained weights")
    diff.add_argument("b", help="another with the same tensors")
    diff.add_argument("--by-layer", action="store_true", help="sum over the tensors of each layer")
    diff.add_argument("--rows", type=int, help="print this many only, largest relative drift first")
    diff.add_argument("--json", metavar="FILE", help="write the numbers, too")
    diff.add_argument("--picture", metavar="FILE", help="draw them, too (.png, .pdf, .svg)")
    compare = verb("compare", _compare, "run what is missing of a grid of methods, settings and seeds, and compare")
    compare.add_argument("grid", help="YAML file of the comparison (docs/compare.md)")
    compare.add_argument("--dry-run", action="store_true", help="print search space, budget and missing trials only")
    demo = verb("demo", _demo, "fine-tune a shipped model on pictograms and compare the methods")
    demo.add_argument(
        "--task", choices=("contrastive", "vqa"), default="contrastive",
        help="contrastive: the CLIP-style model on classes; vqa: the small VLM on questions",
    )  # fmt: skip
    demo.add_argument("--folder", default="runs/demo", help="where the runs go (default: %(default)s)")
    demo.add_argument(
        "--backend", choices=("fsdp2", "zero1", "zero2", "zero3"), default="fsdp2", help="sharding backend"
    )
    demo.add_argument("--processes", type=int, default=2, help="processes to shard over (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps of each run (fewer: a quick look)")
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.dry_run is not None:
        from digrap_scale.training.dry_run import dry_run

        dry_run(_load(options), options.dry_run, options.world_size, print)
        return
    if options.world_size is not None:
        raise ConfigError("--world-size: it is for --dry-run; a run has as many processes as its launcher starts")
    from digrap_scale.training.run import train

    train(_load(options))


def _evaluate(options: argparse.Namespace) -> None:
    from digrap_scale.training.evaluate import evaluate

    evaluate(_load(options), options.weights)


def _validate(options: argparse.Namespace) -> None:
    config = _load(options)
    from digrap_scale.training.validate import validate

    for line in validate(config, options.world_size):
        print(line)
    print(f"{options.config}: no problems found")


def _plan(options: argparse.Namespace) -> None:
    from rich.console import Console

    from digrap_scale.planning.plan import alternatives, parse_bytes, plan
    from digrap_scale.planning.show import show_alternatives, show_plan
    from digrap_scale.training.batches import describe_data, open_training_data

    device_memory = None if options.device_memory is None else parse_bytes(options.device_memory)
    config, ranks, console = _load(options), options.world_size, Console()
    show_plan(plan(config, ranks), config, ranks, device_memory, console)
    show_alternatives(alternatives(config, ranks), device_memory, console)
    if config.data.allow_commands:
        print("data: not opened (data.allow_commands: shards would be fetched)")
        return
    try:
        lines = describe_data(config, ranks, open_training_data(config).sources)
    except ConfigError as error:  # a plan may be older than its data; validate is where this is an error
        lines = [f"data: not planned: {problem}" for problem in error.problems]
    for line in lines:
        print(line)


def _interpolate(options: argparse.Namespace) -> None:
    from digrap_scale.checkpoint.interpolate import interpolate

    shows = sys.stderr.isatty()
    folders = interpolate(options.a, options.b, options.out, options.alpha, show_progress=shows)
    for alpha, folder in folders.items():
        print(f"alpha {alpha:g}: {folder}")


def _index(options: argparse.Namespace) -> None:
    from digrap_scale.data.index import check, index

    if options.check:
        lines = check(options.shards, processes=options.processes)
    else:
        lines = index(options.shards, name=options.name, skip=options.skip_bad, processes=options.processes)
    for line in lines:
        print(line)


def _convert(options: argparse.Namespace) -> None:
    import digrap_scale.models.towers  # noqa: F401  known to transformers from here on: the shipped models are made of them
    from digrap_scale.checkpoint.convert import convert

    folder = convert(
        options.source,
        options.out,
        options.to,
        world_size=options.world_size,
        dtype=options.dtype,
        merge_into=options.merge_adapter,
        companions=options.companions,
        max_shard_bytes=options.max_shard_bytes,
        verify=options.verify,
        show_progress=sys.stderr.isatty(),
    )
    print(f"{options.source} → {folder} ({options.to}{', verified' if options.verify else ''})")


def _diff(options: argparse.Namespace) -> None:
    from pathlib import Path

    from rich.console import Console

    import digrap_scale.models.towers  # noqa: F401  as for convert
    from digrap_scale.checkpoint.diff import diff, write_json
    from digrap_scale.checkpoint.diff_report import draw, show_table

    drifts = diff(options.a, options.b, by_layer=options.by_layer, show_progress=sys.stderr.isatty())
    show_table(drifts, Console(), options.rows)
    if options.json:
        write_json(Path(options.json), drifts)
    if options.picture:
        draw(Path(options.picture), drifts, f"{options.a} → {options.b}")


def _compare(options: argparse.Namespace) -> None:
    from digrap_scale.compare.run import compare

    compare(options.grid, dry_run=options.dry_run)


def _demo(options: argparse.Namespace) -> None:
    from digrap_scale.demo.run import demo
    from digrap_scale.demo.vqa import demo_vqa

    run = demo_vqa if options.task == "vqa" else demo
    run(options.folder, backend=options.backend, processes=options.processes, steps=options.steps)


def _quiet_libraries() -> None:
    """Progress bars and notices of libraries that would tear our own progress on the screen."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported by transformers, warns on stdout
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _load(options: argparse.Namespace) -> Config:
    try:
        return load_config(options.config, options.overrides)
    except ConfigError as error:
        error.agreed = True  # every rank reads the same file
        raise
