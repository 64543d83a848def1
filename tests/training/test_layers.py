"""`layers.jsonl`: conflicts and drift per layer, measured beside the training and without a mark on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForImageClassification

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.layers import encode_layers, read_layers
from digrap_scale.evaluation.strength import encode_names
from tests.distributed.resume_runs import run_here, values_of
from tests.models.tiny import save_vit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"), classes=16)


def run(model: Path, folder: Path, method: str, steps: int, every: int | None) -> dict[str, Any]:
    """A run at a constant rate, so that its first steps are those of a shorter one; its weights."""
    logging = {"every_steps": 1, "tensorboard": False, "layers_every_steps": every}
    values = values_of(
        model,
        folder,
        "single",
        method={"name": method},
        schedule={"name": "constant", "warmup_steps": 0},
        training={"steps": steps, "global_batch_samples": 12},
        checkpoint={"every_steps": None, "final": True},
        logging=logging,
    )
    run_here(values)
    return weights_of(folder / "final")


def weights_of(folder: Path) -> dict[str, Any]:
    """By parameter name, float32 arrays."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_plain_fine_tuning_is_measured_and_not_changed(model: Path, tmp_path: Path) -> None:
    start = weights_of(model)
    two = run(model, tmp_path / "two", "none", 2, None)
    plain = run(model, tmp_path / "plain", "none", 3, None)
    measured = run(model, tmp_path / "measured", "none", 3, 1)
    assert plain.keys() == measured.keys() and all(np.array_equal(plain[name], measured[name]) for name in plain)
    assert read_layers(tmp_path / "plain") is None
    history = read_layers(tmp_path / "measured")
    assert history is not None and history.steps == [1, 2, 3] and history.counted == [1, 1, 1]
    assert not history.drift[0].any() and not history.conflict_rate[0].any()
    # Before the third step the weights are those of a run of two.
    expected = [np.linalg.norm((two[name] - start[name]).astype(np.float64)) for name in history.names]
    np.testing.assert_allclose(history.drift[2], expected, rtol=1e-4, atol=1e-9)


def test_conflicts_are_those_of_the_report(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "each", "digrap", 6, 1)
    run(model, tmp_path / "some", "digrap", 6, 4)
    each, some = read_layers(tmp_path / "each"), read_layers(tmp_path / "some")
    assert each is not None and some is not None
    lines = [json.loads(line) for line in (tmp_path / "each" / "metrics.jsonl").read_text().splitlines()]
    told = [line["conflict_rate"] for line in lines]
    np.testing.assert_allclose(each.conflict_rate.mean(axis=1), told, atol=1e-6)
    assert 0 < max(told) <= 1
    # Every four steps, and at the end what is left: the same in the sum.
    assert (some.steps, some.counted) == ([4, 6], [4, 2])
    np.testing.assert_allclose(some.conflict_rate[0], each.conflict_rate[:4].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(some.whole_rate, each.whole_rate, atol=1e-5)
    np.testing.assert_allclose(some.drift[1], each.drift[5], rtol=1e-5)


def test_ftp_has_no_such_product(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "ftp", "ftp", 2, 1)
    assert read_layers(tmp_path / "ftp") is None


def test_a_resumed_run_names_its_layers_again(tmp_path: Path) -> None:
    rows = [encode_layers(step, 2, [0.5], [float(step)]) for step in (2, 4)]
    (tmp_path / "layers.jsonl").write_text(encode_names(["a"]) + rows[0] + encode_names(["a"]) + rows[1] + '{"ste')
    history = read_layers(tmp_path)
    assert history is not None and history.steps == [2, 4] and history.drift.tolist() == [[2.0], [4.0]]
    (tmp_path / "layers.jsonl").write_text(encode_names(["a"]) + rows[0] + encode_names(["b"]))
    with pytest.raises(ConfigError, match="line 3: expected the layers of its first line"):
        read_layers(tmp_path)
    (tmp_path / "layers.jsonl").write_text(encode_names(["a", "b"]) + rows[0])
    with pytest.raises(ConfigError, match="line 2: expected 2 values"):
        read_layers(tmp_path)
