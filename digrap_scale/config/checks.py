"""Rules that tie several keys together. They read plain values by path, so that they also run on a config that has
other errors, and every problem comes out at once. What depends on the world size is checked where that is known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .data_checks import DATA_CHECKS
from .method_checks import METHOD_CHECKS
from .rules import Check, Path, Problem

GENERATIVE_TASKS = ("vqa", "classification-as-vqa")
CROSS_FIELD = "cross_field"  # pydantic error type of a config whose keys are fine one by one


def _length(steps: int | None, epochs: int | None, samples: int | None) -> Iterable[Problem]:
    given = {"steps": steps, "epochs": epochs, "samples": samples}
    found = {key: value for key, value in given.items() if value is not None}
    if not found:
        yield ("training",), "expected `steps`, `epochs` or `samples`, found none"
    elif len(found) > 1:
        shown = " and ".join(f"{key} ({value})" for key, value in found.items())
        yield ("training", list(found)[1]), f"expected `steps`, `epochs` or `samples`, found {shown}; keep one"


def _sources(
    train: Sequence[str], sources: Sequence[Mapping[str, Any]], order: str, remainder: str
) -> Iterable[Problem]:
    if not train and not sources:
        yield ("data",), "expected shards in `train` or `sources`, found neither"
    if train and sources:
        yield ("data", "sources"), "expected `train` or `sources`, found both; make `train` one of the sources"
    if sources and order != "global":
        yield (
            ("data", "order"),
            f"expected `global` with data.sources, found `{order}`; a mixture is one sequence for all ranks",
        )
    if sources and remainder != "drop":
        yield (
            ("data", "remainder"),
            f"expected no value with data.sources, found `{remainder}`; a mixture goes on without an end",
        )
    yield from _own_names([source["name"] for source in sources], ("data", "sources"))


def _buckets(bucketed: bool, sources: Sequence[Mapping[str, Any]], buffer_samples: int) -> Iterable[Problem]:
    if bucketed and sources:
        yield (
            ("data", "bucket_by_length"),
            "expected `false` with data.sources, found true; a batch has several sources",
        )
    if bucketed and buffer_samples == 0:
        yield (
            ("data", "bucket_by_length"),
            "expected `false` with data.shuffle_buffer_samples 0, found true; samples are sorted within that many",
        )


def _bad_samples(on_bad_sample: str, max_bad_samples: int) -> Iterable[Problem]:
    if on_bad_sample != "skip" and max_bad_samples != 100:
        yield (
            ("data", "max_bad_samples"),
            f"expected no value with data.on_bad_sample `{on_bad_sample}`, found {max_bad_samples}; it is for `skip`",
        )


def _padded(remainder: str, target: str) -> Iterable[Problem]:
    if remainder == "pad" and target == "caption":
        yield (
            ("data", "remainder"),
            "expected `drop` or `repeat` with data.target `caption`, found `pad`; its loss compares a batch's captions",
        )


def _accumulation(global_samples: int, micro_samples: int | None) -> Iterable[Problem]:
    if micro_samples is not None and global_samples % micro_samples:
        yield (
            ("training", "micro_batch_samples"),
            f"expected a divisor of training.global_batch_samples ({global_samples}), found {micro_samples}",
        )


def _warmup(warmup_steps: int, steps: int | None) -> Iterable[Problem]:
    if steps is not None and warmup_steps >= steps:
        yield ("schedule", "warmup_steps"), f"expected fewer than training.steps ({steps}), found {warmup_steps}"


def _trained(freeze: Sequence[str], train_only: Sequence[str]) -> Iterable[Problem]:
    if freeze and train_only:
        yield ("model", "train_only"), "expected `freeze` or `train_only`, found both; remove one"


def _batch_norm(batch_norm: str, backend: str) -> Iterable[Problem]:
    if batch_norm == "train" and backend != "single":
        yield (
            ("model", "batch_norm"),
            f"expected `frozen` with sharding.backend `{backend}`, found `train`; statistics follow one process's data",
        )


def _fsdp2_only(backend: str, wrap: Sequence[str], reshard: bool, replicas: int) -> Iterable[Problem]:
    if backend == "fsdp2":
        return
    for key, given, default in (
        ("wrap", list(wrap), []),
        ("reshard_after_forward", reshard, True),
        ("replicas", replicas, 1),
    ):
        if given != default:
            shown = str(given).lower() if isinstance(given, bool) else given
            yield (
                ("sharding", key),
                f"expected no value with sharding.backend `{backend}`, found {shown}; only fsdp2 has it",
            )


def _float16(precision: str, backend: str) -> Iterable[Problem]:
    if precision == "float16" and not backend.startswith("zero"):
        yield (
            ("sharding", "mixed_precision"),
            f"expected `none` or `bfloat16` with sharding.backend `{backend}`, found `float16`; its loss scale needs "
            "zero1, zero2 or zero3",
        )


def _offload(offload: str, backend: str) -> Iterable[Problem]:
    if offload == "cpu" and backend in ("single", "ddp"):
        yield (
            ("sharding", "offload"),
            f"expected `none` with sharding.backend `{backend}`, found `cpu`; fsdp2, zero1, zero2 and zero3 can offload",
        )


def _deepspeed_config(file: str | None, backend: str) -> Iterable[Problem]:
    if file is not None and not backend.startswith("zero"):
        yield (
            ("sharding", "deepspeed_config"),
            f"expected nothing with sharding.backend `{backend}`, found {file}; it is for zero1, zero2 and zero3",
        )


def _zero(zero: Mapping[str, Any] | None, backend: str) -> Iterable[Problem]:
    if zero is None:
        return
    if not backend.startswith("zero"):
        yield ("sharding", "zero"), f"expected nothing with sharding.backend `{backend}`, found a section; remove it"
        return
    for key, default in (("sub_group_elements", 1_000_000_000), ("persistence_threshold_elements", 100_000)):
        value = zero.get(key, default)
        if backend != "zero3" and value != default:
            yield (
                ("sharding", "zero", key),
                f"expected no value with sharding.backend `{backend}`, found {value}; it is for zero3",
            )


def _target(target: str, task: str, classes: str | None) -> Iterable[Problem]:
    if target == "caption" and task != "contrastive":
        yield (
            ("data", "target"),
            f"expected `label` with model.task `{task}`, found `caption`; captions need task `contrastive`",
        )
    if target == "label" and classes is None and task != "vqa":
        yield ("data", "classes"), "expected a JSON file of classes because data.target is `label`, found nothing"


def _dora(lora: Mapping[str, Any] | None, placement: str) -> Iterable[Problem]:
    if lora is not None and dict(lora).get("dora") and placement == "stream":
        yield (
            ("reference", "placement"),
            "expected `device` or `cpu` with model.lora.dora, found `stream`; the reference of its magnitudes has no file",
        )


def _vqa(task: str, prompt: str, augment: str, generation: object, class_answers: str) -> Iterable[Problem]:
    if "{question}" not in prompt:
        yield ("data", "prompt"), f"expected a text with {{question}} in it, found {prompt!r}"
    if task == "vqa" and augment != "none":
        yield (
            ("data", "augment"),
            f"expected `none` with model.task `vqa`, found `{augment}`; a crop may cut off what the question is about",
        )
    if task not in GENERATIVE_TASKS and generation is not None:
        yield (
            ("evaluation", "generation"),
            f"expected nothing with model.task `{task}`, found a section; it is for tasks that generate",
        )
    if task != "classification-as-vqa" and class_answers != "generate":
        yield (
            ("evaluation", "class_answers"),
            f"expected no value with model.task `{task}`, found `{class_answers}`; it is for classification-as-vqa",
        )


def _commands(allow_commands: bool, cache_folder: str | None) -> Iterable[Problem]:
    if allow_commands and cache_folder is None:
        yield ("data", "cache_folder"), "expected a folder with data.allow_commands, found none"
    if cache_folder is not None and not allow_commands:
        yield (
            ("data", "cache_folder"),
            f"expected nothing without data.allow_commands, found {cache_folder!r}; nothing is fetched",
        )


def _packed(
    pack_tokens: int | None, max_forward_tokens: int | None, max_forward_images: int | None, task: str
) -> Iterable[Problem]:
    given = {
        "pack_tokens": pack_tokens,
        "max_forward_tokens": max_forward_tokens,
        "max_forward_images": max_forward_images,
    }
    for key, value in given.items():
        if value is not None and task not in GENERATIVE_TASKS:
            yield (
                ("data", key),
                f"expected nothing with model.task `{task}`, found {value}; it is for tasks that generate",
            )


def _optimizer(name: str, momentum: float, betas: Sequence[float], eps: float) -> Iterable[Problem]:
    if name != "sgd" and momentum > 0:
        yield (
            ("optimizer", "momentum"),
            f"expected 0 with optimizer.name `{name}`, found {momentum:g}; Adam's momentum is the first of `betas`",
        )
    if name == "sgd":
        for key, value, default in (("betas", list(betas), [0.9, 0.999]), ("eps", eps, 1e-8)):
            if value != default:
                yield ("optimizer", key), f"expected no value with optimizer.name `sgd`, found {value}; it is Adam's"


def _statistics(statistics: str, backend: str, placement: str) -> Iterable[Problem]:
    if statistics == "backward" and backend not in ("single", "fsdp2"):
        yield (
            ("training", "statistics"),
            f"expected `step` with sharding.backend `{backend}`, found `backward`; it does not tell when a gradient is "
            "reduced",
        )
    if statistics == "backward" and placement == "stream":
        yield (
            ("training", "statistics"),
            "expected `step` with reference.placement `stream`, found `backward`; it needs the reference in memory",
        )


def _streamed(placement: str, source: str, buffer_bytes: int) -> Iterable[Problem]:
    if placement != "stream" and buffer_bytes != 256 << 20:
        yield (
            ("reference", "buffer_bytes"),
            f"expected no value with reference.placement `{placement}`, found {buffer_bytes}; it is for `stream`",
        )
    if placement == "stream" and source == "initial":
        yield (
            ("reference", "placement"),
            "expected `device` or `cpu` with reference.source `initial`, found `stream`; that reference has no file",
        )


def _projection(projection: str, name: str) -> Iterable[Problem]:
    if projection == "fused" and name not in ("adamw", "adam"):
        yield (
            ("training", "projection"),
            f"expected `separate` with optimizer.name `{name}`, found `fused`; it is Adam's pass",
        )


def _native(native: bool, backend: str) -> Iterable[Problem]:
    if native and not backend.startswith("zero"):
        yield (
            ("checkpoint", "deepspeed_native"),
            f"expected `false` with sharding.backend `{backend}`, found `true`; only zero1, zero2 and zero3 have an engine",
        )


def _suite_names(suite: Sequence[Mapping[str, Any]]) -> Iterable[Problem]:
    return _own_names([entry["name"] for entry in suite], ("evaluation", "suite"))


def _own_names(names: Sequence[str], path: Path) -> Iterable[Problem]:
    """Every entry of a list of sections has a name of its own."""
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in first:
            where = ".".join(map(str, path))
            yield (
                (*path, index, "name"),
                f"expected a name of its own, found {name!r} again (first: {where}.{first[name]})",
            )
        first.setdefault(name, index)


def _suite_file(suite_file: str | None) -> Iterable[Problem]:
    if suite_file is not None:  # `load_config` has put its test sets into `suite` by now
        yield (
            ("evaluation", "suite_file"),
            f"expected nothing in a config that is built in Python, found {suite_file}; load it with load_config",
        )


def _kept(keep_every_steps: int | None, every_steps: int | None) -> Iterable[Problem]:
    key = ("checkpoint", "keep_every_steps")
    if keep_every_steps is None:
        return
    if every_steps is None:
        yield key, f"expected nothing without checkpoint.every_steps, found {keep_every_steps}"
    elif keep_every_steps % every_steps:
        yield key, f"expected a multiple of checkpoint.every_steps ({every_steps}), found {keep_every_steps}"


def _group_patterns(groups: Sequence[Mapping[str, Any]]) -> Iterable[Problem]:
    first: dict[str, int] = {}
    for index, group in enumerate(groups):
        pattern = group["pattern"]
        if pattern in first:
            yield (
                ("optimizer", "groups", index, "pattern"),
                f"expected a pattern of its own, found {pattern!r} again (first: optimizer.groups.{first[pattern]})",
            )
        first.setdefault(pattern, index)


CHECKS = (
    Check(("training.steps", "training.epochs", "training.samples"), _length),
    Check(("training.global_batch_samples", "training.micro_batch_samples"), _accumulation),
    Check(("schedule.warmup_steps", "training.steps"), _warmup),
    Check(("model.freeze", "model.train_only"), _trained),
    Check(("model.batch_norm", "sharding.backend"), _batch_norm),
    Check(("sharding.backend", "sharding.wrap", "sharding.reshard_after_forward", "sharding.replicas"), _fsdp2_only),
    Check(("sharding.mixed_precision", "sharding.backend"), _float16),
    Check(("sharding.offload", "sharding.backend"), _offload),
    Check(("sharding.zero", "sharding.backend"), _zero),
    Check(("sharding.deepspeed_config", "sharding.backend"), _deepspeed_config),
    Check(("data.target", "model.task", "data.classes"), _target),
    Check(("data.train", "data.sources", "data.order", "data.remainder"), _sources),
    Check(("data.remainder", "data.target"), _padded),
    Check(("data.bucket_by_length", "data.sources", "data.shuffle_buffer_samples"), _buckets),
    Check(("data.on_bad_sample", "data.max_bad_samples"), _bad_samples),
    Check(
        ("model.task", "data.prompt", "data.augment", "evaluation.generation", "evaluation.class_answers"),
        _vqa,
    ),
    Check(("data.allow_commands", "data.cache_folder"), _commands),
    Check(("data.pack_tokens", "data.max_forward_tokens", "data.max_forward_images", "model.task"), _packed),
    Check(("model.lora", "reference.placement"), _dora),
    Check(("optimizer.name", "optimizer.momentum", "optimizer.betas", "optimizer.eps"), _optimizer),
    Check(("optimizer.groups",), _group_patterns),
    Check(("training.statistics", "sharding.backend", "reference.placement"), _statistics),
    Check(("reference.placement", "reference.source", "reference.buffer_bytes"), _streamed),
    Check(("training.projection", "optimizer.name"), _projection),
    Check(("checkpoint.deepspeed_native", "sharding.backend"), _native),
    Check(("evaluation.suite",), _suite_names),
    Check(("evaluation.suite_file",), _suite_file),
    Check(("checkpoint.keep_every_steps", "checkpoint.every_steps"), _kept),
    *DATA_CHECKS,
    *METHOD_CHECKS,
)


def cross_field_problems(values: Mapping[str, Any], broken: Collection[Path] = ()) -> list[Problem]:
    """Every rule that the config breaks.

    Args:
        values: section → key → value, defaults filled in (``Config.model_dump()`` or the raw mapping).
        broken: paths that have a problem of their own; rules that need them, or something in them, do not run.

    Returns:
        (path of the key to mend, "expected …, found …") of each broken rule.
    """
    problems: list[Problem] = []
    for check in CHECKS:
        needs = [tuple(need.split(".")) for need in check.needs]
        if any(_overlap(need, path) for need in needs for path in broken):
            continue
        problems += check.run(*(_at(values, need) for need in needs))
    return problems


def _at(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    for key in path:
        values = values[key]
    return values


def _overlap(first: Path, second: Path) -> bool:
    """Whether one path leads to, or into, the other."""
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]
