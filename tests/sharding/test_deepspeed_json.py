"""A DeepSpeed JSON that the user brings: merged where it adds, named where it contradicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.config import Config, parse_config
from digrap_scale.errors import ConfigError
from digrap_scale.sharding.deepspeed_json import json_problems, merged, zero_sizes

BASE = """
run: {folder: runs/x}
model: {path: somewhere, task: classification}
data: {train: [a.tar], classes: classes.json}
method: {name: digrap}
optimizer: {learning_rate: 1e-3}
training: {steps: 3, global_batch_samples: 8, micro_batch_samples: 2, max_grad_norm: 1.0}
"""


def config_of(file: Path, settings: Any, sharding: str = "backend: zero2") -> Config:
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return parse_config(f"{BASE}sharding: {{{sharding}, deepspeed_config: {file}}}\n")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, training.global_batch_samples is 8; make them agree"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, sharding.backend is zero2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, training.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, sharding.mixed_precision is none"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", optimizer.name is adamw'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1, optimizer.learning_rate is 0.001"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the learning rate is this config's"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 'device is "nvme", sharding.offload is none'),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com`; did you mean `overlap_comm`?"),
        ({"wall_clock_brakdown": True}, "unknown key `wall_clock_brakdown`; did you mean `wall_clock_breakdown`?"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size: "),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param: offloaded parameters are not supported"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, training.micro_batch_samples is 2"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "the key 'steps_per_print' is there twice"),
        ("[1]", "expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_what_contradicts_is_named(tmp_path: Path, settings: Any, expected: str) -> None:
    file = tmp_path / "ds.json"
    problems = json_problems(config_of(file, settings))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"sharding.deepspeed_config: {file}: ") and expected in problems[0], problems


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path / "ds.json", {"train_batch_size": 16, "gradient_clipping": 2, "nonsense": 1})
    with pytest.raises(ConfigError) as caught:
        merged(config, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4})
    assert len(caught.value.problems) == 3


def test_what_agrees_is_merged_and_auto_is_ours(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.0}},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "allgather_bucket_size": 1000,
            "reduce_bucket_size": 5000,
        },
        "wall_clock_breakdown": True,
        "steps_per_print": 7,
        "bf16": {"enabled": "auto"},
    }
    config = config_of(tmp_path / "ds.json", settings)
    assert zero_sizes(config).reduce_bucket_elements == 5000
    ours = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": zero_sizes(config).reduce_bucket_elements},
    }
    assert json_problems(config, ours) == []
    assert merged(config, ours) == {
        **ours,
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
        "bf16": {},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "allgather_bucket_size": 1000,
            "reduce_bucket_size": 5000,
        },
    }


def test_accumulation_is_compared_where_ranks_are_known(tmp_path: Path) -> None:
    config = config_of(tmp_path / "ds.json", {"gradient_accumulation_steps": 1})
    assert json_problems(config) == []
    (problem,) = json_problems(config, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2})
    assert "gradient_accumulation_steps is 1" in problem and "is 2; make them agree" in problem


def test_a_size_in_both_is_a_contradiction(tmp_path: Path) -> None:
    sharding = "backend: zero3, zero: {sub_group_elements: 10}"
    config = config_of(tmp_path / "ds.json", {"zero_optimization": {"sub_group_size": 20}}, sharding)
    (problem,) = json_problems(config)
    assert "zero_optimization.sub_group_size is 20, sharding.zero.sub_group_elements is 10" in problem


def test_the_file_is_for_zero_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sharding.deepspeed_config: expected nothing with sharding.backend `fsdp2`"):
        config_of(tmp_path / "ds.json", {}, "backend: fsdp2")
