"""transformers' Trainer with one line more equals a plain loop with ``attach``: ω and weights, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.integrations.hf_trainer import STATE_FILE, DigrapCallback
from tests.distributed.ranks import run_ranks
from tests.integrations.trainer_runs import arguments, train, train_and_resume
from tests.integrations.vlm_data import (
    STEPS,
    assert_same,
    load_pretrained,
    samples,
    stacked,
)

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    "backend", ["fsdp2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("ddp", "zero2", "zero3"))]
)
def test_equals_a_plain_loop(folder: str, expected: dict[str, Any], backend: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    ranks = run_ranks(2, tmp_path / "ranks", train_and_resume, folder, str(output), backend, 2)
    for got in ranks:
        assert got["whole"]["backend"] == backend
        assert_same(got["whole"], expected)
        assert_same(got["resumed"], got["whole"], atol=1e-6)
        lines = [line for line in got["whole"]["history"] if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines[-1]["strength_mean"] > 0 and lines[-1]["conflict_rate"] == pytest.approx(
            expected["conflict_rate"], abs=0.05
        )
    saved = output / f"checkpoint-{STEPS}"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert all("strength_mean" in line for line in history if "loss" in line)
    with safe_open(saved / STATE_FILE, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    of_layers = {key.removeprefix("strength/"): float(v) for key, v in kept.items() if key.startswith("strength/")}
    assert of_layers == pytest.approx(ranks[0]["resumed"]["strength"], abs=1e-6)


def test_one_process_and_a_resume_that_lost_the_weights(folder: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """transformers 5.23 maps the names in a LLaVA's file on loading, but not when a Trainer resumes: it only warns."""
    got = train_and_resume(folder, str(tmp_path), "ddp", 1)
    assert_same(got["whole"], expected)
    assert_same(got["resumed"], got["whole"], atol=1e-6)
    with pytest.raises(CheckpointError, match=r"are not the saved ones .* build the model by from_pretrained"):
        train(folder, str(tmp_path), "ddp", 1, True, reload=False)


def make_trainer(folder: str, output: Path, **more: Any) -> Trainer:
    settings = TrainingArguments(**arguments(output, "ddp", 1, **more))
    return Trainer(load_pretrained(folder), settings, train_dataset=samples(), data_collator=stacked)


def test_as_one_of_the_callbacks(folder: str, tmp_path: Path) -> None:
    trainer = make_trainer(folder, tmp_path, max_steps=2, save_strategy="no")
    callback = DigrapCallback(reference="initial", log_layers=True)
    trainer.add_callback(callback)
    trainer.train()
    line = next(line for line in trainer.state.log_history if line["step"] == 2)
    assert callback.projector is not None and callback.projector.report.step == 2
    assert {name for name in line if name.startswith("strength/")} == {
        f"strength/{name}" for name in callback.projector.strength()
    }
    with pytest.raises(ConfigError, match="max_grad_norm=0.1, and the Trainer clips to 0.5"):
        DigrapCallback(reference="initial", max_grad_norm=0.1).add_to(make_trainer(folder, tmp_path)).on_train_begin(
            trainer.args, trainer.state, trainer.control
        )


def test_what_a_resumed_run_must_find(folder: str, tmp_path: Path) -> None:
    make_trainer(folder, tmp_path / "plain", max_steps=2, save_steps=2).train()
    resumed = {"max_steps": 3, "save_steps": 3}
    trainer = make_trainer(folder, tmp_path / "plain", **resumed)
    DigrapCallback(reference=folder).add_to(trainer)
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}: not found; .* saved without a method"):
        trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(folder, tmp_path / "plain", **resumed)
    DigrapCallback(reference="initial").add_to(trainer)
    with pytest.raises(ConfigError, match="goes on from step 2; give the folder of the pre-trained weights"):
        trainer.train(resume_from_checkpoint=True)

    trainer = make_trainer(folder, tmp_path / "other", max_steps=2, save_steps=2)
    DigrapCallback(reference=folder).add_to(trainer)
    trainer.train()
    trainer = make_trainer(folder, tmp_path / "plain", **resumed)
    DigrapCallback(reference=folder, resume_from=tmp_path / "other" / "checkpoint-2").add_to(trainer)
    with pytest.raises(CheckpointError, match="it is not the checkpoint that the Trainer resumed"):
        trainer.train(resume_from_checkpoint=True)
