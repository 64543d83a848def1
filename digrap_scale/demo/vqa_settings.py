"""The VQA demo's data, model and settings, as the configs of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digrap_scale.config import Config, parse_config
from digrap_scale.config.strict_yaml import dump
from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo.settings import ASSETS, METHODS, STRENGTH_LR
from digrap_scale.errors import ConfigError

__all__ = ["LEARNING_RATES", "METHODS", "STRENGTH_LR", "make_config", "write_sets"]

FOUNDATION = ASSETS / "pictogram_vlm"
SHIPPED = ASSETS / "pictogram_vqa"  # easy-vqa's part, and which candidates are adversarial
TRAIN_SAMPLES, TEST_SAMPLES = 1600, 100
STEPS, WARMUP_STEPS, BATCH = 100, 10, 16
MAX_NEW_TOKENS = 8
# Linear layers of projector and language model; the image tower stays as it is.
LORA = {
    "rank": 8,
    "alpha": 16.0,
    "target_modules": r".*(language_model.*\.(q|k|v|o|gate|up|down)_proj|multi_modal_projector\.linear_\d)",
}
# In 100 steps: at 1e-3 full fine-tuning ends below zero-shot, even in its own style.
LEARNING_RATES = {"full": 1e-4, "LoRA": 5e-3}


def write_sets(folder: Path) -> None:
    """Compose the demo's sets from the shipped pictograms: training, ID, near sets, the adversarial one.

    Raises:
        ConfigError: the small VLM was not made yet, or the shipped shards cannot be read.
        SaveError: the disk refuses.
    """
    for made in (FOUNDATION / "model.safetensors", SHIPPED / "adversarial.json"):
        if not made.exists():
            raise ConfigError(f"demo --task vqa: {made} is not there; make it with tools/pretrain_pictogram_vlm.py")
    tiles, label = vqa.read_tiles(ASSETS / "pictograms")
    vqa.write_set(vqa.TRAIN, tiles, label, folder, range(TRAIN_SAMPLES))
    for spec in (vqa.VALIDATION, *vqa.TESTS):
        vqa.write_set(spec, tiles, label, folder, range(TEST_SAMPLES))
    wrong = vqa.read_indices(SHIPPED / "adversarial.json")[:TEST_SAMPLES]
    vqa.write_set(vqa.ADVERSARIAL, tiles, label, folder, wrong)


def suite(sets: Path) -> list[dict[str, Any]]:
    """The table's test sets, of the shards in ``sets`` and of easy-vqa."""
    entries = [
        {
            "name": spec.name,
            "shards": [str(sets / f"{vqa.prefix(spec)}-*.tar")],
            "shift": spec.shift,
            "modality": spec.modality,
        }
        for spec in (*vqa.TESTS, vqa.ADVERSARIAL)
    ]
    far = {"name": "easy-vqa", "shards": [str(SHIPPED / "easy-vqa-*.tar")], "shift": "far", "modality": "other"}
    return [*entries, far]


def make_config(
    folder: Path, sets: Path, method: dict[str, Any], tuning: str, *, backend: str, steps: int
) -> tuple[Config, str]:
    """The config of one run, checked, and as YAML (which ``digrap-scale train`` takes).

    Args:
        folder: the run's.
        sets: where ``write_sets`` wrote.
        method: the config's section.
        tuning: a key of ``LEARNING_RATES``.
        backend: the config's ``sharding.backend``.
        steps: optimizer steps.
    """
    values: dict[str, Any] = {
        "run": {"folder": str(folder), "overwrite": True},
        "model": {"path": str(FOUNDATION), "task": "vqa", **({"lora": LORA} if tuning == "LoRA" else {})},
        "data": {"train": [str(sets / f"{vqa.prefix(vqa.TRAIN)}-*.tar")]},
        "method": method,
        "optimizer": {"learning_rate": LEARNING_RATES[tuning]},
        "schedule": {"name": "cosine", "warmup_steps": min(WARMUP_STEPS, steps // 2)},
        "sharding": {"backend": backend},
        "training": {"steps": steps, "global_batch_samples": BATCH},
        "evaluation": {"suite": suite(sets), "generation": {"max_new_tokens": MAX_NEW_TOKENS}},
        "logging": {"strength_every_steps": 1},
    }
    text = dump(values)
    return parse_config(text, "demo"), text
