from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.suite import SuiteResult, evaluate_suite
from digrap_scale.types import Batch


class Task:
    class_names = ["cat", "dog", "owl"]

    def logits(self, model, batch):
        assert not model.training and not torch.is_grad_enabled()
        return model(batch.inputs["pixel_values"])


class Model(nn.Module):
    """Gives back its input as logits."""

    def __init__(self):
        super().__init__()
        self.frozen_norm = nn.BatchNorm1d(3).eval()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return self.dropout(x)


def batch(guesses, labels):
    one_hot = torch.nn.functional.one_hot(torch.tensor(guesses), 3).float()
    return Batch({"pixel_values": one_hot}, None if labels is None else torch.tensor(labels))


LOADERS = {
    "noto": [batch([0, 1], [0, 1]), batch([2, 0], [2, 1])],
    "lines": [batch([0, 0], [0, 1])],
    "twemoji": [batch([1, 1, 2], [1, 1, -1])],
    "photos": [batch([0, 0, 0, 0], [0, 1, 2, 2])],
}
SHIFTS = {"noto": "id", "lines": "near", "twemoji": "near", "photos": "far"}


def run(model=None, loaders=None, shifts=None, reduce_=None):
    return evaluate_suite(model or Model(), Task(), loaders or LOADERS, shifts or SHIFTS, device="cpu", reduce_=reduce_)


def test_accuracies_and_means():
    result = run()
    assert {name: (one.accuracy, one.samples) for name, one in result.sets.items()} == {
        "noto": (0.75, 4),
        "lines": (0.5, 2),
        "twemoji": (1.0, 2),
        "photos": (0.25, 4),
    }
    assert result.sets["noto"].standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result.sets["noto"].class_accuracy == {"cat": 1.0, "dog": 0.5, "owl": 1.0}
    assert result.sets["twemoji"].class_accuracy == {"dog": 1.0}
    assert result.id_mean == 0.75 and result.near_mean == 0.75 and result.far_mean == 0.25
    assert result.ood_mean == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    assert result.error("far") == result.sets["photos"].standard_error


def test_modalities():
    result = evaluate_suite(Model(), Task(), LOADERS, SHIFTS, device="cpu", modalities={"lines": "vision"})
    assert {name: one.modality for name, one in result.sets.items()} == {
        "noto": "none",
        "lines": "vision",
        "twemoji": "none",
        "photos": "none",
    }
    assert SuiteResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_absent_means_are_none():
    result = run(loaders={"noto": LOADERS["noto"]})
    assert result.id_mean == 0.75
    assert result.near_mean is result.far_mean is result.ood_mean is result.error("near") is None


def test_every_module_gets_its_own_mode_back():
    model = Model().train()
    model.frozen_norm.eval()
    run(model)
    assert model.training and model.dropout.training and not model.frozen_norm.training
    with pytest.raises(ConfigError):
        run(model, loaders={"noto": [batch([0], None)]})
    assert model.training and not model.frozen_norm.training


def test_one_reduction_sums_ranks():
    calls = []

    def two_equal_ranks(counts):
        calls.append(counts.shape)
        counts *= 2

    result = run(reduce_=two_equal_ranks)
    assert calls == [(4, 2, 3)]
    assert result.sets["noto"].samples == 8 and result.sets["noto"].accuracy == 0.75


def test_a_rank_may_hold_padding_only():
    # the other rank's two samples arrive by the reduction
    def other_rank(counts):
        counts += torch.tensor([[[1, 0, 0], [1, 1, 0]]])

    result = run(loaders={"noto": [batch([0, 0], [-1, -1])]}, reduce_=other_rank)
    assert (result.sets["noto"].accuracy, result.sets["noto"].samples) == (0.5, 2)


@pytest.mark.parametrize(
    ("loaders", "shifts", "message"),
    [
        ({"empty": []}, {"empty": "id"}, "test set empty has no sample"),
        ({"padded": [batch([0], [-1])]}, {"padded": "id"}, "test set padded has no sample"),
        ({"bare": [batch([0], None)]}, {"bare": "id"}, "test set bare has no labels"),
        ({"wide": [batch([0], [3])]}, {"wide": "id"}, "test set wide: labels from 3 to 3, expected 0 to 2"),
        ({"noto": LOADERS["noto"]}, {"noto": "middle"}, "test set noto: shift is 'middle', expected one of id"),
        ({"noto": LOADERS["noto"]}, {"other": "id"}, "test set noto: shift is None"),
    ],
)
def test_bad_sets_are_named(loaders, shifts, message):
    with pytest.raises(ConfigError, match=message):
        run(loaders=loaders, shifts=shifts)


def test_empty_suite():
    with pytest.raises(ConfigError, match="evaluation.suite is empty"):
        evaluate_suite(Model(), Task(), {}, {}, device="cpu")


def test_wrong_number_of_logits():
    narrow = Task()
    narrow.class_names = ["cat", "dog"]
    with pytest.raises(ConfigError, match="test set noto: the model gives 3 logits, expected 2"):
        evaluate_suite(Model(), narrow, LOADERS, SHIFTS, device="cpu")


def test_through_json_and_back():
    result = run()
    stored = json.loads(json.dumps(result.to_dict()))
    assert SuiteResult.from_dict(stored) == result
    assert stored["ood_mean"] == result.ood_mean


@pytest.mark.parametrize("stored", [{}, {"sets": 3}, {"sets": {"noto": {"shift": "id"}}}])
def test_not_a_result(stored):
    with pytest.raises(ConfigError, match="not a stored suite result"):
        SuiteResult.from_dict(stored)
