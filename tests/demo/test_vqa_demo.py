"""The small VLM that ships, and the VQA demo's configs; the demo itself, in a few steps (slow)."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from digrap_scale.cli import main
from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo import vqa_settings
from digrap_scale.demo.settings import ASSETS
from digrap_scale.evaluation.report import read_report
from digrap_scale.models.towers import EfficientNetLiteTokensModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import score_pictogram_vqa as scoring  # noqa: E402

VLM, SHIPPED = vqa_settings.FOUNDATION, vqa_settings.SHIPPED


def test_demo_says_how_to_make_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vqa_settings, "FOUNDATION", tmp_path / "pictogram_vlm")
    assert main(["demo", "--task", "vqa", "--folder", str(tmp_path)]) == 2
    assert "tools/pretrain_pictogram_vlm.py" in capsys.readouterr().err


def test_shipped_vlm_is_the_one_of_the_recipe_and_small() -> None:
    weights = VLM / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest in (VLM / "RECIPE.md").read_text(encoding="utf-8")
    assert json.loads((SHIPPED / "adversarial.json").read_text(encoding="utf-8"))["model_sha256"] == digest


def test_shipped_vlm_loads_whole_in_plain_transformers() -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(VLM, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert isinstance(model.model.vision_tower, EfficientNetLiteTokensModel)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 8_000_000
    stored = load_file(VLM / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("running_var")} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("weight")} == {torch.bfloat16}
    assert AutoProcessor.from_pretrained(VLM).tokenizer.vocab_size == model.config.text_config.vocab_size


@pytest.mark.parametrize(
    ("styles", "least"),
    [
        pytest.param(vqa.COLOUR_STYLES, 0.15, id="seen styles", marks=pytest.mark.slow),
        pytest.param((vqa.SOURCE,), 0.08, id="an unseen style"),
    ],
)
def test_shipped_vlm_beats_the_question_alone_on_unseen_concepts(styles: tuple[str, ...], least: float) -> None:
    """Balanced answers, and no "what", which is asked about concepts that training saw."""
    tiles, label = vqa.read_tiles(ASSETS / "pictograms")
    spec = vqa.SetSpec("balanced", styles, prior="balanced", draws="balanced")
    samples = [vqa.decoded(sample) for sample in vqa.samples(spec, tiles, label, range(300))]
    counts = scoring.score(scoring.Answerer(VLM), samples, {})["unseen"]
    assert counts["samples"] == 240
    assert counts["right"] / 240 > counts["blind"] / 240 + least, counts


def test_adversarial_numbers_are_whole() -> None:
    wrong = vqa.read_indices(SHIPPED / "adversarial.json")
    assert len(wrong) >= vqa_settings.TEST_SAMPLES and len(set(wrong)) == len(wrong)


def test_shipped_far_set_is_whole() -> None:
    far = list(vqa.read_set(SHIPPED, "easy-vqa"))
    assert len(far) >= 100 and {sample["meta"]["question_type"] for sample in far} == {"yes/no", "shape", "color"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000


@pytest.mark.parametrize("tuning", vqa_settings.LEARNING_RATES)
def test_configs_name_every_modality(tuning: str, tmp_path: Path) -> None:
    config, text = vqa_settings.make_config(
        tmp_path / "run", tmp_path / "sets", {"name": "digrap"}, tuning, backend="fsdp2", steps=10
    )
    assert (config.model.lora is not None) == (tuning == "LoRA")
    shifted = {entry.modality for entry in config.evaluation.suite if entry.shift == "near"}
    assert shifted == {"vision", "question", "answer", "multimodal", "adversarial"}
    assert {entry.shift for entry in config.evaluation.suite} == {"id", "near", "far"}
    assert str(tmp_path) in text


@pytest.mark.slow
def test_demo_runs_and_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa_settings, "TEST_SAMPLES", 8)
    monkeypatch.setattr(vqa_settings, "TRAIN_SAMPLES", 64)
    assert main(["demo", "--task", "vqa", "--folder", str(tmp_path), "--steps", "2"]) == 0
    rows, _ = read_report(tmp_path / "results.json")
    names = [row.name for row in rows]
    assert names == [
        "zero-shot",
        *(f"{tuning}: {name}" for tuning in ("full", "LoRA") for name in vqa_settings.METHODS),
    ]
    assert all(len(row.result.sets) == len(vqa.TESTS) + 2 for row in rows)
