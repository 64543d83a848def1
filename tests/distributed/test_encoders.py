"""ViT, ViT-MAE, BEiT, ResNet, CLIP and SigLIP on sharded weights: steps, evaluation, saving, plain transformers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from digrap_scale.config.schema import Config
from digrap_scale.data.shards import write_shards
from tests.data.samples import encoded
from tests.distributed.encoder_runs import encoder_config, run_all_encoders
from tests.distributed.ranks import run_ranks
from tests.models.tiny import CLASSES, save_beit, save_clip, save_resnet, save_siglip, save_vit, save_vit_mae

SAVE: dict[str, Any] = {
    "vit_mae": save_vit_mae,
    "beit": save_beit,
    "vit": save_vit,
    "resnet": save_resnet,
    "clip": save_clip,
    "siglip": save_siglip,
}
CONTRASTIVE = ("clip", "siglip")
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    samples = (
        {
            "key": f"{i:03d}",
            "image": encoded(tuple(c // (1 + i // 6) for c in COLOURS[list(CLASSES)[i // 2 % 3]]), size=16),
            "extension": "png",
            "meta": {"label": list(CLASSES)[i // 2 % 3]},
        }
        for i in range(13)
    )
    write_shards(samples, folder, prefix="train", samples_per_shard=100)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


def configs(folder: Path, kinds: list[str], backend: str, where: str) -> dict[str, Config]:
    found = {}
    for kind in kinds:
        if not (folder / kind).exists():
            SAVE[kind](folder / kind)
        found[kind] = encoder_config(
            str(folder / kind),
            "contrastive" if kind in CONTRASTIVE else "classification",
            backend,
            str(folder / where / kind),
            str(folder / "train-*.tar"),
            str(folder / "classes.json"),
            new_head=kind == "vit_mae",
        )
    return found


QUICK = ["vit_mae", "beit"]
CASES = [
    pytest.param(("fsdp2", QUICK), id="fsdp2"),
    pytest.param(("fsdp2", [kind for kind in SAVE if kind not in QUICK]), id="fsdp2-rest", marks=pytest.mark.slow),
    pytest.param(("zero3", list(SAVE)), id="zero3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_and_opens_in_plain_transformers(case: tuple[str, list[str]], folder: Path) -> None:
    backend, kinds = case
    results = run_ranks(2, folder / f"ranks-{backend}", run_all_encoders, configs(folder, kinds, backend, backend))
    alone = run_all_encoders(configs(folder, kinds, "single", "single"))
    for kind in kinds:
        got, expected = results[0][kind], alone[kind]
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-4), kind
        assert results[1][kind]["losses"] == got["losses"]
        assert set(got["weights"]) == set(expected["weights"])
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                got["weights"][name], weight, atol=2e-5, rtol=1e-5, msg=lambda m, n=name, k=kind: f"{k} {n}: {m}"
            )
        assert got["result"] == results[1][kind]["result"] and got["result"]["sets"]["same"]["samples"] == 13
        assert got["result"]["sets"]["same"]["accuracy"] == expected["result"]["sets"]["same"]["accuracy"], kind
        auto: Any = AutoModel if kind in CONTRASTIVE else AutoModelForImageClassification
        model = auto.from_pretrained(folder / backend / kind / "final").eval()
        if kind not in CONTRASTIVE:
            assert list(model.config.id2label.values()) == list(CLASSES)  # names, for whoever opens it
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, got["weights"][name]), f"{kind} {name}"
        for rank in results:
            with torch.no_grad():
                output = model(**rank[kind]["inputs"])
            logits = output.logits_per_image if kind in CONTRASTIVE else output.logits
            torch.testing.assert_close(logits, rank[kind]["logits"], atol=1e-5, rtol=1e-5)
