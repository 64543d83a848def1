"""Layers that share an ω are one vector: a module's or a block's tensors, told by their names."""

from __future__ import annotations

import pytest
import torch

from digrap_scale.errors import ConfigError
from digrap_scale.method import DiGraP, DiGraPUpdate
from digrap_scale.method.grouping import BLOCK_PATTERN, Grouping
from tests.method.test_methods import step, views_of

NAMES = [
    "vision.layers.0.q.weight",
    "vision.layers.0.q.bias",
    "vision.layers.10.q.weight",
    "text.layers.0.q.bias",
    "norm",
]
ALL = torch.ones(5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "pattern", "sums"),
    [
        ("tensor", BLOCK_PATTERN, [1, 2, 4, 8, 16]),
        ("module", BLOCK_PATTERN, [3, 3, 4, 8, 16]),
        ("block", BLOCK_PATTERN, [3, 3, 4, 8, 16]),
        ("block", r"layers\.\d+", [11, 11, 4, 11, 16]),
        ("block", r"^(vision|text)", [7, 7, 7, 8, 16]),
    ],
)
def test_groups(kind: str, pattern: str, sums: list[int]) -> None:
    groups = Grouping(NAMES, ALL, kind, pattern)
    assert groups.sums(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)).tolist() == sums
    assert int(groups.counted_L.sum()) == len(set(sums))


def test_layers_without_a_reference_are_in_no_group() -> None:
    groups = Grouping(NAMES, torch.tensor([False, True, True, True, False]), "block", r"^vision")
    assert groups.sums(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)).tolist()[:4] == [6, 6, 6, 8]
    assert groups.counted_L.tolist() == [False, True, False, True, False]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="method.block_pattern: 'block' matches none of 5 layers, such as 'vision"):
        Grouping(NAMES, ALL, "block", "block")


def test_a_group_is_projected_as_one_vector() -> None:
    """Its gradient has no component along its displacement left (ω = 1), though single layers have."""
    views = views_of(3)
    method = DiGraP(1e-9, grouping="block", block_pattern="^l", fixed_strength=1.0)
    method.prepare(torch.ones(3, dtype=torch.bool), ["l0", "l1", "l2"])
    d = [(view.weight - view.reference).double() for view in views]
    inner = sum(float(view.grad.double() @ one) for view, one in zip(views, d, strict=True))
    if inner >= 0:
        for view in views:
            view.grad.neg_()
    step(method, views)
    after = [float(view.grad.double() @ one) for view, one in zip(views, d, strict=True)]
    assert abs(sum(after)) < 1e-4 and max(map(abs, after)) > 0.1 and method.conflict().all()


@pytest.mark.parametrize("cls", [DiGraP, DiGraPUpdate])
def test_a_fixed_strength_stays(cls: type) -> None:
    method = cls(fixed_strength=0.25)
    method.prepare(torch.ones(3, dtype=torch.bool))
    for seed in range(3):
        step(method, views_of(seed))
        assert method.strength().tolist() == [0.25] * 3
    assert method.needs_previous == (cls is DiGraPUpdate), "nothing is kept for a hyper-gradient that nobody takes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed_strength": 1.5}, "fixed_strength must be from 0 to 1"),
        ({"grouping": "layer"}, "grouping must be one of"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiGraP(**options)
