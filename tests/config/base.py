"""A good config, and how tests damage it."""

from __future__ import annotations

import pytest

from digrap_scale.config import parse_config
from digrap_scale.errors import ConfigError

BASE = """\
run:
  folder: runs/first
model:
  path: models/clip
  task: contrastive
data:
  train: ["shards/train-{000..003}.tar"]
  classes: classes.json
method:
  name: digrap
  strength_lr: 1e-2
optimizer:
  learning_rate: 2e-3
training:
  steps: 100
  global_batch_samples: 64
"""


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the ConfigError that ``text`` ends in."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "run.yaml", overrides)
    assert caught.value.exit_code == 2
    for line in caught.value.problems:
        assert line.isprintable(), line
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert BASE.count(old) == 1
    return BASE.replace(old, new)
