"""Bad configs, each with the one line that it must end in. A case stays on one line, however long."""
# ruff: noqa: E501

from __future__ import annotations

import time

import pytest

from .base import changed, problems

# (what is replaced in BASE, by what, start of the one line, further pieces of it)
BAD = [
    ("  strength_lr: 1e-2", "  strength_lr: nope", "run.yaml:11: method.strength_lr: expected a number > 0, ", ["`nope`"]),
    ("  strength_lr: 1e-2", "  strength_rl: 1e-2", "run.yaml:11: unknown key `method.strength_rl` for method `digrap`; did you mean `strength_lr`?", []),
    ("  strength_lr: 1e-2", "  weight: 0.1", "run.yaml:11: unknown key `method.weight` for method `digrap`;", ["strength_lr", "hypergradient"]),
    ("name: digrap\n", "name: pcgrad\n", "run.yaml:11: unknown key `method.strength_lr` for method `pcgrad`;", []),
    ("name: digrap\n  strength_lr: 1e-2", "name: l2sp", "run.yaml:9: method.weight: expected a number ≥ 0, found nothing", []),
    ("name: digrap\n  strength_lr: 1e-2", "name: ftp\nreference: {source: zero}", "run.yaml:11: reference.source: expected `initial` with method.name `ftp`, found `zero`;", []),
    ("name: digrap\n  strength_lr: 1e-2", "name: ftp\n  annealing: 1.5", "run.yaml:11: method.annealing: expected a number ≥ 0 and ≤ 1, found `1.5`", []),
    ("name: digrap\n  strength_lr: 1e-2", "name: linear_probe", "run.yaml:9: method.head: expected regexes of the head's parameters, found none;", ["`visual_projection`"]),
    ("name: digrap\n  strength_lr: 1e-2", "name: lp_ft\n  head: [visual_projection]", "run.yaml:9: method.probe_steps: expected a whole number > 0, found nothing", []),
    ("name: digrap\n  strength_lr: 1e-2", "name: lp_ft\n  head: [visual_projection]\n  probe_steps: 100", "run.yaml:12: method.probe_steps: expected fewer than training.steps − schedule.warmup_steps (100), found 100;", []),
    ("  strength_lr: 1e-2", "  strength_lr: 5e-2\n  fixed_strength: 0.5", "run.yaml:11: method.strength_lr: expected no value with method.fixed_strength, found 0.05;", []),
    ("  strength_lr: 1e-2", "  fixed_strength: 2", "run.yaml:11: method.fixed_strength: expected a number ≥ 0 and ≤ 1 or null, found `2`", []),
    ("  strength_lr: 1e-2", "  block_pattern: 'layers'", "run.yaml:11: method.block_pattern: expected no value with method.grouping `tensor`, found 'layers';", []),
    ("optimizer:", "evaluation: {interpolate_alphas: [0.5]}\noptimizer:", "run.yaml:12: evaluation.interpolate_alphas: expected no value without evaluation.suite, found [0.5];", []),
    ("name: digrap\n", "name: digrab\n", "run.yaml:10: method.name: expected `none`, `digrap`,", ["did you mean `digrap`?"]),
    ("name: digrap\n", "name: [digrap]\n", "run.yaml:10: method.name: expected `none`,", ["found a list"]),
    ("  name: digrap\n", "", "run.yaml:9: method.name: expected `none`, `digrap`,", ["found nothing"]),
    ("method:\n  name: digrap\n  strength_lr: 1e-2", "method: digrap", "run.yaml:9: method: expected a mapping with `name`, found text `digrap`", ["write `name: digrap`"]),
    ("method:\n  name: digrap\n  strength_lr: 1e-2\n", "", "run.yaml:1: method: expected a section with name (none, digrap", ["found nothing"]),
    ("  learning_rate: 2e-3", "  learing_rate: 2e-3", "run.yaml:13: unknown key `optimizer.learing_rate`; did you mean `learning_rate`?", []),
    ("  learning_rate: 2e-3", "  learning-rate: 2e-3", "run.yaml:13: unknown key `optimizer.learning-rate`; did you mean `learning_rate`?", []),
    ("  steps: 100", "  steps: 100\n  learning_rate: 1", "run.yaml:16: unknown key `training.learning_rate`; did you mean `optimizer.learning_rate`?", []),
    ("  steps: 100", "  steps: 100\n  qqqq: 1", "run.yaml:16: unknown key `training.qqqq`; known: steps, epochs,", []),
    ("optimizer:", "optimiser:", "run.yaml:12: unknown section `optimiser`; did you mean `optimizer`?", []),
    ("run:\n", "<<: {a: 1}\nrun:\n", "run.yaml:1: unknown section `<<`;", []),
    ("optimizer:\n  learning_rate: 2e-3\n", "", "run.yaml:1: optimizer: expected a section with name, learning_rate,", ["found nothing"]),
    ("optimizer:\n  learning_rate: 2e-3\n", "optimizer:\n", "run.yaml:12: optimizer: expected a mapping of keys, found nothing", ["give it keys"]),
    ("optimizer:\n  learning_rate: 2e-3\n", "optimizer: [1]\n", "run.yaml:12: optimizer: expected a mapping of keys, found a list", []),
    ("  learning_rate: 2e-3", "  weight_decay: 1", "run.yaml:12: optimizer.learning_rate: expected a number > 0, found nothing", []),
    ("2e-3", ".nan", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `.nan`", ["finite"]),
    ("2e-3", ".inf", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `.inf`", ["finite"]),
    ("2e-3", "1e999", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `1e999`", ["finite"]),
    ("2e-3", "-2e-3", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `-2e-3`", []),
    ("2e-3", "0", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `0`", []),
    ("2e-3", '"2e-3"', "run.yaml:13: optimizer.learning_rate: expected a number > 0, found text `2e-3`", ["without quotes"]),
    ("2e-3", "1:30", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found text `1:30`", ["plain decimal"]),
    ("2e-3", "true", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found `true`", []),
    ("2e-3", "", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found nothing", []),
    ("2e-3", "nan", "run.yaml:13: optimizer.learning_rate: expected a number > 0, found text `nan`", []),
    ("steps: 100", "steps: 0100", "run.yaml:15: training.steps: expected a whole number > 0 or null, found text `0100`", []),
    ("steps: 100", "steps: 0o100", "run.yaml:15: training.steps: expected a whole number > 0 or null, found text `0o100`", []),
    ("steps: 100", "steps: 0x64", "run.yaml:15: training.steps: expected a whole number > 0 or null, found text `0x64`", []),
    ("steps: 100", "steps: 1_000", "run.yaml:15: training.steps: expected a whole number > 0 or null, found text `1_000`", []),
    ("steps: 100", "steps: 1:30:00", "run.yaml:15: training.steps: expected a whole number > 0 or null, found text", []),
    ("steps: 100", "steps: 1e2", "run.yaml:15: training.steps: expected a whole number > 0 or null, found `1e2`; write `100`", []),
    ("steps: 100", "steps: 1.5", "run.yaml:15: training.steps: expected a whole number > 0 or null, found `1.5`", []),
    ("steps: 100", "steps: true", "run.yaml:15: training.steps: expected a whole number > 0 or null, found `true`", []),
    ("steps: 100", "steps: " + "9" * 5000, "run.yaml:15: training.steps: expected a whole number of at most 64 bits, found 9", []),
    ("steps: 100", "steps: 9223372036854775808", "run.yaml:15: training.steps: expected a whole number of at most 64 bits", []),
    ("runs/first", "2024", "run.yaml:2: run.folder: expected text, found `2024`; put it in quotes", []),
    ("runs/first", '""', "run.yaml:2: run.folder: expected text, found text ``", []),
    ("runs/first", '"a\\0b"', "run.yaml:2: run.folder: expected text, found the character 0x0000", []),
    ("runs/first", '"\\ud800"', "run.yaml:2: run.folder: expected text, found the character 0xd800", []),
    ("runs/first", "a\n  overwrite: yes", "run.yaml:3: run.overwrite: expected `true` or `false`, found text `yes`; write `true`", []),
    ("runs/first", "a\n  overwrite: 0", "run.yaml:3: run.overwrite: expected `true` or `false`, found `0`", []),
    ("runs/first", "a\n  seed: -1", "run.yaml:3: run.seed: expected a whole number ≥ 0", ["found `-1`"]),
    ("runs/first", "a\n  folder: b", "run.yaml:3: run.folder: expected it once, found it twice (first on line 2)", []),
    ("runs/first", 'a\n  "folder": b', "run.yaml:3: run.folder: expected it once, found it twice (first on line 2)", []),
    ("runs/first", "a\n  1: b", "run.yaml:3: run: expected a key that is text, found `1`", []),
    ("runs/first", "a\n  ? [x]\n  : b", "run.yaml:3: run: expected a key that is text, found a sequence", []),
    ("task: contrastive", "task: contrastve", "run.yaml:5: model.task: expected `classification`, `contrastive`, `vqa` or `classification-as-vqa`, found text `contrastve`; did you mean `contrastive`?", []),
    ("task: contrastive", 'task: contrastive\n  freeze: ["("]', "run.yaml:6: model.freeze.0: expected a regex, found text `(` (missing )", []),
    ("task: contrastive", 'task: contrastive\n  freeze: [""]', "run.yaml:6: model.freeze.0: expected a regex, found text ``", []),
    ("task: contrastive", "task: contrastive\n  freeze: x", "run.yaml:6: model.freeze: expected a list of regexes, found text `x`", []),
    ("task: contrastive", "task: contrastive\n  train_only: ['a{99999999999}']", "run.yaml:6: model.train_only.0: expected a regex", []),
    ("task: contrastive", "task: contrastive\n  lora: {target_modules: '['}", "run.yaml:6: model.lora.target_modules: expected a regex or a list", ["unterminated"]),
    ("task: contrastive", "task: contrastive\n  lora: {target_modules: 3}", "run.yaml:6: model.lora.target_modules: expected a regex or a list", ["found `3`"]),
    ("task: contrastive", "task: contrastive\n  lora: {target_modules: {a: 1}}", "run.yaml:6: model.lora.target_modules: expected a regex or a list", ["found a mapping"]),
    ("task: contrastive", "task: contrastive\n  lora: {target_modules: [q, 3]}", "run.yaml:6: model.lora.target_modules.1: expected text, found `3`", []),
    ("task: contrastive", "task: contrastive\n  lora: {rang: 3, target_modules: q}", "run.yaml:6: unknown key `model.lora.rang`; did you mean `rank`?", []),
    ("optimizer:", "reference: {rename: {'(': a}}\noptimizer:", "run.yaml:12: reference.rename: expected a regex as key, found text `(` (missing )", []),
    ("optimizer:", "reference: {rename: {a: '\\2'}}\noptimizer:", "run.yaml:12: reference.rename: expected a replacement that fits its regex 'a'", ["group reference"]),
    ("optimizer:", "optimizer:\n  betas: [0.9]", "run.yaml:13: optimizer.betas.1: expected a number ≥ 0 and < 1, found nothing", []),
    ("optimizer:", "optimizer:\n  betas: [0.9, 1]", "run.yaml:13: optimizer.betas.1: expected a number ≥ 0 and < 1, found `1`", []),
    ("optimizer:", "optimizer:\n  betas: [0.9, '1']", "run.yaml:13: optimizer.betas.1: expected a number ≥ 0 and < 1, found text `1`", []),
    ("optimizer:", "optimizer:\n  betas: [0.9, 0.9, 0.9]", "run.yaml:13: optimizer.betas: expected a list of 2 numbers", []),
    ("optimizer:", "optimizer:\n  groups: [{pattern: '*'}]", "run.yaml:13: optimizer.groups.0.pattern: expected a regex, found text `*`", []),
    ('["shards/train-{000..003}.tar"]', "[]", "run.yaml:6: data: expected shards in `train` or `sources`, found neither", []),
    ('["shards/train-{000..003}.tar"]', "[a, 3]", "run.yaml:7: data.train.1: expected text, found `3`", []),
    ('["shards/train-{000..003}.tar"]', "[a,\n    3]", "run.yaml:8: data.train.1: expected text, found `3`", []),
    ('["shards/train-{000..003}.tar"]', "a.tar", "run.yaml:7: data.train: expected a list of text, found text `a.tar`", []),
    # Rules over several keys.
    ("  steps: 100\n", "", "run.yaml:14: training: expected `steps`, `epochs` or `samples`, found none", []),
    ("  steps: 100\n", "  steps: 100\n  epochs: 2\n", "run.yaml:16: training.epochs: expected `steps`, `epochs` or `samples`, found steps", []),
    ("  steps: 100\n", "  steps: 100\n  micro_batch_samples: 48\n", "run.yaml:16: training.micro_batch_samples: expected a divisor of training.global_batch_samples (64), found 48", []),
    ("  steps: 100\n", "  steps: 100\n  micro_batch_samples: 128\n", "run.yaml:16: training.micro_batch_samples: expected a divisor", []),
    ("optimizer:", "schedule: {warmup_steps: 100}\noptimizer:", "run.yaml:12: schedule.warmup_steps: expected fewer than training.steps (100), found 100", []),
    ("task: contrastive", "task: contrastive\n  freeze: [a]\n  train_only: [b]", "run.yaml:7: model.train_only: expected `freeze` or `train_only`, found both", []),
    ("task: contrastive", "task: contrastive\n  batch_norm: train\nsharding: {backend: fsdp2}", "run.yaml:6: model.batch_norm: expected `frozen` with sharding.backend `fsdp2`, found `train`", []),
    ("optimizer:", "sharding:\n  backend: zero3\n  wrap: [Block]\noptimizer:", "run.yaml:14: sharding.wrap: expected no value with sharding.backend `zero3`, found ['Block']; only fsdp2 has it", []),
    ("optimizer:", "sharding:\n  backend: ddp\n  reshard_after_forward: false\noptimizer:", "run.yaml:14: sharding.reshard_after_forward: expected no value with sharding.backend `ddp`, found false", []),
    ("optimizer:", "sharding:\n  replicas: 2\noptimizer:", "run.yaml:13: sharding.replicas: expected no value with sharding.backend `single`, found 2", []),
    ("optimizer:", "sharding:\n  backend: ddp\n  offload: cpu\noptimizer:", "run.yaml:14: sharding.offload: expected `none` with sharding.backend `ddp`, found `cpu`", []),
    ("task: contrastive", "task: contrastive\nsharding: {backend: fsdp2, mixed_precision: float16}", "run.yaml:6: sharding.mixed_precision: expected `none` or `bfloat16` with sharding.backend `fsdp2`, found `float16`", ["zero2"]),
    ("task: contrastive", "task: contrastive\nsharding: {backend: ddp, offload: cpu}", "run.yaml:6: sharding.offload: expected `none` with sharding.backend `ddp`, found `cpu`", ["fsdp2"]),
    ("task: contrastive", "task: contrastive\nsharding: {backend: fsdp2, zero: {sub_group_elements: 5}}", "run.yaml:6: sharding.zero: expected nothing with sharding.backend `fsdp2`, found a section", []),
    ("task: contrastive", "task: contrastive\nsharding: {backend: zero2, zero: {sub_group_elements: 5}}", "run.yaml:6: sharding.zero.sub_group_elements: expected no value with sharding.backend `zero2`, found 5", ["zero3"]),
    ("  classes: classes.json\n", "", "run.yaml:6: data.classes: expected a JSON file of classes", []),
    ("optimizer:", "optimizer:\n  momentum: 0.9", "run.yaml:13: optimizer.momentum: expected 0 with optimizer.name `adamw`, found 0.9", []),
    ("optimizer:", "optimizer:\n  name: sgd\n  eps: 1e-6", "run.yaml:14: optimizer.eps: expected no value with optimizer.name `sgd`", []),
    ("optimizer:", "optimizer:\n  groups: [{pattern: a}, {pattern: a}]", "run.yaml:13: optimizer.groups.1.pattern: expected a pattern of its own", []),
    ("optimizer:", "evaluation:\n  suite:\n  - {name: a, shards: [x], shift: id}\n  - {name: a, shards: [y], shift: far}\noptimizer:", "run.yaml:15: evaluation.suite.1.name: expected a name of its own, found 'a' again", []),
    ("optimizer:", "evaluation: {suite: [{name: a, shards: [x], shift: ood}]}\noptimizer:", "run.yaml:12: evaluation.suite.0.shift: expected `id`, `near` or `far`, found text `ood`", []),
    ("  classes: classes.json", "  classes: classes.json\n  sources: [{name: a, shards: [x], weight: 1}]\n  order: global", "run.yaml:9: data.sources: expected `train` or `sources`, found both", []),
    ('  train: ["shards/train-{000..003}.tar"]', "  sources: [{name: a, shards: [x], weight: 1}]", "run.yaml:6: data.order: expected `global` with data.sources, found `local`", []),
    ('  train: ["shards/train-{000..003}.tar"]', "  order: global\n  remainder: pad\n  sources: [{name: a, shards: [x], weight: 1}]", "run.yaml:8: data.remainder: expected no value with data.sources, found `pad`", []),
    ('  train: ["shards/train-{000..003}.tar"]', "  order: global\n  sources: [{name: a, shards: [x], weight: 1}, {name: a, shards: [y], weight: 1}]", "run.yaml:8: data.sources.1.name: expected a name of its own, found 'a' again (first: data.sources.0)", []),
    ("  classes: classes.json", "  target: caption\n  remainder: pad", "run.yaml:9: data.remainder: expected `drop` or `repeat` with data.target `caption`", []),
    ("  classes: classes.json", "  classes: classes.json\n  max_bad_samples: 5", "run.yaml:9: data.max_bad_samples: expected no value with data.on_bad_sample `error`, found 5", []),
    ("  classes: classes.json", "  classes: classes.json\n  on_bad_sample: skip\nevaluation: {shift_degree: {}, suite: [{name: a, shards: [x], shift: id}]}", "run.yaml:9: data.on_bad_sample: expected `error` with evaluation.shift_degree, found `skip`;", []),
    ("task: contrastive", "task: contrastive\n  batch_norm: train\nevaluation: {interpolate_alphas: [0.5], suite: [{name: a, shards: [x], shift: id}]}", "run.yaml:7: evaluation.interpolate_alphas: expected no value with model.batch_norm `train`, found [0.5];", ["digrap-scale interpolate"]),
    ("optimizer:", "checkpoint: {every_steps: 500, keep_every_steps: 750}\noptimizer:", "run.yaml:12: checkpoint.keep_every_steps: expected a multiple of checkpoint.every_steps (500), found 750", []),
    ("optimizer:", "checkpoint: {every_steps: null, keep_every_steps: 750}\noptimizer:", "run.yaml:12: checkpoint.keep_every_steps: expected nothing without checkpoint.every_steps, found 750", []),
    ("  classes: classes.json", "  classes: classes.json\n  bucket_by_length: true\n  shuffle_buffer_samples: 0", "run.yaml:9: data.bucket_by_length: expected `false` with data.shuffle_buffer_samples 0", []),
    # Not YAML, or more YAML than a config needs.
    ("2e-3", "*x", "run.yaml:13: expected plain YAML, found an alias `*x`;", []),
    ("2e-3", "&x 2e-3", "run.yaml:13: expected plain YAML, found an anchor `&x`;", []),
    ("2e-3", "!!float 2e-3", "run.yaml:13: expected plain YAML, found a tag `!!float`;", []),
    ("2e-3", "!!python/object/apply:os.system ['true']", "run.yaml:13: expected plain YAML, found a tag `!!python/object/apply:os.system`;", []),
    ("2e-3", "!x 2e-3", "run.yaml:13: expected plain YAML, found a tag `!x`;", []),
    ("2e-3", "[1, 2", "run.yaml:14: not YAML:", []),
    ("2e-3", "1: 2", "run.yaml:13: not YAML:", []),
    ("2e-3", '"\\UFFFFFFFF"', "run.yaml:13: not YAML:", []),
    ("  learning_rate: 2e-3", "\tlearning_rate: 2e-3", "run.yaml:13: not YAML:", []),
    ("2e-3", "2e-3\n---\na: b", "run.yaml:14: not YAML:", []),
    ("2e-3", "2\0", "run.yaml:13: expected printable text, found the character 0x0000", []),
    ("2e-3", "[" * 15 + "]" * 15, "run.yaml:13: optimizer.learning_rate: expected a number > 0, found a list", []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "start", "pieces"), BAD, ids=[f"{i}-{case[2][9:50]}" for i, case in enumerate(BAD)]
)
def test_a_bad_config_ends_in_one_line(old: str, new: str, start: str, pieces: list[str]) -> None:
    found = problems(changed(old, new))
    assert len(found) == 1, found
    assert found[0].startswith(start), found[0]
    for piece in pieces:
        assert piece in found[0]


def test_captions_need_the_contrastive_task() -> None:
    text = changed("contrastive", "classification").replace("classes: classes.json", "target: caption")
    assert problems(text) == [
        "run.yaml:8: data.target: expected `label` with model.task `classification`, found `caption`; "
        "captions need task `contrastive`"
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "run.yaml:1: expected the sections run, model,"),
        ("# nothing\n", "run.yaml:1: expected the sections run, model,"),
        ("- a\n", "run.yaml:1: expected a mapping of the sections run, model,"),
        ("just text", "run.yaml:1: expected a mapping of the sections run, model,"),
        ("3", "run.yaml:1: expected a mapping of the sections run, model,"),
        ("%YAML 9.0\n---\na: b", "run.yaml:1: not YAML"),
        ("a: b\n" * 100_000, "run.yaml:1: expected at most"),
    ],
)
def test_a_text_that_is_no_config(text: str, start: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(start), found[0]


def bomb() -> str:
    lines = ['a: &a ["lol","lol","lol","lol","lol","lol","lol","lol","lol"]']
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join(['*' + before] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "a: " + "[" * 3000 + "]" * 3000,
        "a: " + "[" * 3000,
        "a: " + "[\n" * 3000,
        "a: " + "{a: " * 3000 + "}" * 3000,
        "- " * 3000,
        "? " * 3000,
        "\n".join(" " * depth + "a:" for depth in range(600)),
        "a: &a [*a]",
        "a" * 200_000,
        "[" + "a," * 20_000,
        "a: '" + "\n" * 200_000,
    ],
    ids=range(12),
)
def test_hostile_yaml_ends_in_one_line_and_soon(text: str) -> None:
    start = time.perf_counter()
    found = problems(text)
    assert time.perf_counter() - start < 60  # a hang, or an expansion without end
    assert len(found) == 1
    assert len(found[0]) < 400


def test_every_problem_at_once_in_the_order_of_the_file() -> None:
    text = (
        changed("  steps: 100\n", "  steps: 100\n  epochs: 2\n  micro_batch_samples: 0\n  stepz: 1\n")
        .replace("2e-3", "fast")
        .replace("folder: runs/first", "seed: 1.5")
        .replace("name: digrap", "name: digrap\n  normalization: batch\n  hypergradent: all")
        .replace("  classes: classes.json\n", "")
    )
    starts = [
        "run.yaml:1: run.folder: expected text, found nothing",
        "run.yaml:2: run.seed: expected a whole number",
        "run.yaml:6: data.classes: expected a JSON file",
        "run.yaml:10: method.normalization: expected `layers`, `cosine` or `none`, found text `batch`",
        "run.yaml:11: unknown key `method.hypergradent` for method `digrap`; did you mean `hypergradient`?",
        "run.yaml:14: optimizer.learning_rate: expected a number > 0, found text `fast`",
        "run.yaml:17: training.epochs: expected `steps`, `epochs` or `samples`, found steps",
        "run.yaml:18: training.micro_batch_samples: expected a whole number > 0 or null, found `0`",
        "run.yaml:19: unknown key `training.stepz`; did you mean `steps`?",
        "override `optimizer.momentum=2`: optimizer.momentum: expected a number ≥ 0 and < 1, found `2`",
        "override `nothing`: expected section.key=value",
    ]
    found = problems(text, "optimizer.momentum=2", "nothing")
    assert len(found) == len(starts), found
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start), line


def test_a_flood_of_problems_is_cut() -> None:
    found = problems(changed('["shards/train-{000..003}.tar"]', f"[{', '.join('1' * 500)}]"))
    assert len(found) == 51
    assert found[-1] == "run.yaml: … and 450 more problems"


def test_long_and_multi_line_values_are_shown_on_one_short_line() -> None:
    (line,) = problems(changed("contrastive", '"a\\nb\\e' + "x" * 1000 + '"'))
    assert "`a\\nb\\x1bxxx" in line
    assert len(line) < 250
