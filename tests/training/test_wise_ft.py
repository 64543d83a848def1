"""A run's last weights, interpolated with the first ones: what `digrap-scale interpolate` would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from digrap_scale.checkpoint.interpolate import interpolate
from digrap_scale.cli import main
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_runs import ASSETS, values_of
from tests.distributed.wise_ft_runs import ALPHAS, IMAGES, run_all_interpolated, run_interpolated
from tests.models.tiny import save_vit

SUITE = [{"name": name, "shards": [str(ASSETS / f"{name}-test-*.tar")], "shift": s} for name, s in (("noto", "id"),)]
LORA = {"rank": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def values(path: Path, folder: Path, backend: str, **sections: dict[str, Any]) -> dict[str, Any]:
    return values_of(
        path,
        folder,
        backend,
        evaluation={"suite": SUITE, "interpolate_alphas": list(ALPHAS)},
        checkpoint={"every_steps": None, "final": True},
        optimizer={"learning_rate": 1e-2},
        **sections,
    )


def check(model: Path, folder: Path, of_ranks: list[dict[str, torch.Tensor]]) -> None:
    """Logits at each α are those of the folder that `interpolate` writes; the weights of `final` are back at the end."""
    interpolate(model, folder / "final", folder / "wise", ALPHAS)
    outputs = []
    for alpha in ALPHAS:
        written = AutoModelForImageClassification.from_pretrained(folder / "wise" / f"alpha-{alpha:g}").eval()
        outputs.append(written(IMAGES).logits.detach())
        for logits in of_ranks:
            torch.testing.assert_close(logits[f"{alpha:g}"], outputs[-1], atol=1e-5, rtol=0)
    assert (outputs[0] - outputs[-1]).abs().max() > 0.01, "nothing was trained"
    final = AutoModelForImageClassification.from_pretrained(folder / "final").eval()
    for logits in of_ranks:
        torch.testing.assert_close(logits["after"], final(IMAGES).logits.detach(), atol=1e-5, rtol=0)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows][1:] == [f"{rows[0]['name']} α={alpha:g}" for alpha in ALPHAS]


def test_single_process(model: Path, tmp_path: Path) -> None:
    check(model, tmp_path / "run", [run_interpolated(values(model, tmp_path / "run", "single"))])


def test_adapters_are_interpolated_as_merged_weights(model: Path, tmp_path: Path) -> None:
    """At α the product of the factors is α times what it was."""
    from peft import PeftModel

    folder = tmp_path / "run"
    logits = run_interpolated(values(model, folder, "single", model={"lora": LORA}))
    base = AutoModelForImageClassification.from_pretrained(model).eval()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.testing.assert_close(logits["0"], base(IMAGES).logits.detach(), atol=1e-5, rtol=0)
    merged = PeftModel.from_pretrained(base, str(folder / "final")).merge_and_unload().state_dict()
    half = {name: (start[name] + merged[name]) / 2 for name in start}
    plain = AutoModelForImageClassification.from_pretrained(model).eval()
    plain.load_state_dict(half)
    torch.testing.assert_close(logits["0.5"], plain(IMAGES).logits.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "backends", [["fsdp2", "zero3"], pytest.param(["ddp", "zero1", "zero2"], marks=pytest.mark.slow)]
)
def test_on_two_ranks(backends: list[str], model: Path, tmp_path: Path) -> None:
    runs = {backend: values(model, tmp_path / backend, backend, method={"name": "none"}) for backend in backends}
    results = run_ranks(2, tmp_path / "ranks", run_all_interpolated, runs)
    for backend in backends:
        check(model, tmp_path / backend, [of_rank[backend] for of_rank in results])


def test_a_new_head_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_vit(tmp_path / "model", classes=3)
    config = values(model, tmp_path / "run", "single", model={"new_head": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert "evaluation.interpolate_alphas: the head starts new (3 classes in " in error
    assert not (tmp_path / "run" / "final").exists()
