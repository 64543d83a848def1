"""The demo's data, model and settings, as the configs of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digrap_scale.config import Config, parse_config
from digrap_scale.config.strict_yaml import dump

ASSETS = Path(__file__).parent / "assets"
FOUNDATION = ASSETS / "foundation"
SOURCE = "fluent-emoji-high-contrast"  # the style that is trained on: black line drawings
OTHERS = ("noto", "twemoji", "fluent-emoji-flat", "emojione", "noto-v1", "emojione-monotone")
STEPS, WARMUP_STEPS, BATCH = 150, 10, 64
# Plain fine-tuning forgets at this rate (and at 5e-4): there is something for a method to keep.
LEARNING_RATE = 2e-3
STRENGTH_LR = 0.1
METHODS: dict[str, dict[str, Any]] = {
    "FT": {"name": "none"},
    "DiGraP": {"name": "digrap", "strength_lr": STRENGTH_LR},
    "DiGraP (update)": {"name": "digrap_update", "strength_lr": STRENGTH_LR},
}


def make_config(folder: Path, method: dict[str, Any], *, backend: str, steps: int) -> tuple[Config, str]:
    """The config of one run, checked, and as YAML (which `digrap-scale train` takes)."""
    shards = ASSETS / "pictograms"
    suite = [
        {"name": style, "shards": [str(shards / f"{style}-test-*.tar")], "shift": "id" if style == SOURCE else "near"}
        for style in (SOURCE, *OTHERS)
    ]
    values: dict[str, Any] = {
        "run": {"folder": str(folder), "overwrite": True},
        "model": {"path": str(FOUNDATION), "task": "contrastive"},
        "data": {
            "train": [str(shards / f"{SOURCE}-train-*.tar")],
            "classes": str(shards / "classes.json"),
            "augment": "crop",
        },
        "method": method,
        "optimizer": {"learning_rate": LEARNING_RATE},
        "schedule": {"name": "cosine", "warmup_steps": min(WARMUP_STEPS, steps // 2)},
        "sharding": {"backend": backend},
        "training": {"steps": steps, "global_batch_samples": BATCH},
        "evaluation": {"suite": suite},
        "logging": {"strength_every_steps": 1},
    }
    text = dump(values)
    return parse_config(text, "demo"), text
