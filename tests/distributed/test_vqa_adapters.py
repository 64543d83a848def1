"""LoRA, DoRA, heads trained in full and frozen parts of a vision-language model, on sharded weights against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from digrap_scale.config.schema import Config
from tests.data.vqa_samples import vqa_shard
from tests.distributed.ranks import run_ranks
from tests.distributed.vqa_runs import TEST, TRAIN, merged_answers, run_all_vqa, vqa_config
from tests.models.tiny_vlm import save_tiny_vlm

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "target_modules": TARGETS, "modules_to_save": ["multi_modal_projector"]}},
    "dora": {"lora": {"rank": 2, "target_modules": TARGETS, "dora": True}},
    "frozen": {"freeze": ["vision_tower", "multi_modal_projector"]},
}
pytestmark = pytest.mark.timeout(900)


def configs(folder: Path, backend: str, where: str) -> dict[str, Config]:
    train, test = vqa_shard(folder / "train-000000.tar", TRAIN), vqa_shard(folder / "test-000000.tar", TEST)
    if not (folder / "llava").exists():
        save_tiny_vlm("llava", folder / "llava")
    return {
        name: vqa_config(str(folder / "llava"), backend, str(folder / where / name), str(train), str(test), **settings)
        for name, settings in CASES.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run_all_vqa(configs(folder, "single", "single"))


def row_norms(folder: Path, name: str) -> torch.Tensor:
    """‖W‖ of the pre-trained weight's rows, by the adapted model's name of its magnitude."""
    weights = AutoModelForImageTextToText.from_pretrained(folder / "llava").state_dict()
    plain = name.removeprefix("base_model.model.").split(".lora_magnitude_vector")[0] + ".weight"
    return torch.linalg.vector_norm(weights[plain].double(), dim=1).float()


def test_one_process(folder: Path, alone: dict[str, Any]) -> None:
    """What trains, what is projected, and against what."""
    start = AutoModelForImageTextToText.from_pretrained(folder / "llava").state_dict()
    names = {case: set(got["strength"]) for case, got in alone.items()}
    assert all(".lora_A." in n or ".lora_B." in n or "multi_modal_projector" in n for n in names["lora"])
    assert sum("multi_modal_projector.modules_to_save" in n for n in names["lora"]) == 4
    assert sum("lora_magnitude_vector" in n for n in names["dora"]) == 4
    assert set(alone["dora"]["references"]) == {n for n in names["dora"] if "magnitude" in n}
    for name, reference in alone["dora"]["references"].items():
        torch.testing.assert_close(reference, row_norms(folder, name), atol=1e-5, rtol=1e-5)
        trained = alone["dora"]["weights"][name]
        assert not torch.equal(trained, reference), f"{name} did not train"
    assert not any("vision_tower" in n or "multi_modal_projector" in n for n in names["frozen"])
    for name, weight in alone["frozen"]["weights"].items():
        frozen = "vision_tower" in name or "multi_modal_projector" in name
        assert torch.equal(weight, start[name]) or not frozen, f"{name} was frozen"


@pytest.mark.parametrize(
    "backend", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)]
)
def test_equals_one_process(backend: str, folder: Path, alone: dict[str, Any]) -> None:
    results = run_ranks(2, folder / f"ranks-{backend}", run_all_vqa, configs(folder, backend, backend))
    for case, expected in alone.items():
        got = results[0][case]
        assert got["losses"] == pytest.approx(expected["losses"], rel=2e-4), case
        assert got["strength"] == results[1][case]["strength"]
        assert set(got["weights"]) == set(expected["weights"]), case
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                got["weights"][name], weight, atol=2e-5, rtol=1e-5, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
            )
        for name, reference in got["references"].items():
            torch.testing.assert_close(reference, row_norms(folder, name), atol=1e-5, rtol=1e-5)
        assert merged_answers(results, case) == expected["answers"], case
    for case in ("lora", "dora"):
        base = AutoModelForImageTextToText.from_pretrained(folder / "llava")
        model: Any = PeftModel.from_pretrained(base, str(folder / backend / case / "final")).eval()
        for rank in results:
            mask = rank[case]["inputs"]["attention_mask"].bool()
            with torch.no_grad():
                logits = model(**rank[case]["inputs"]).logits
            torch.testing.assert_close(logits[mask], rank[case]["logits"][mask], atol=1e-4, rtol=1e-5)
