"""Methods as functions of reduced statistics: ω's Adam, normalisations, and what the projection does to the norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.errors import ConfigError
from digrap_scale.method import L2SP, METHODS, SPD, DiGraP, DiGraPUpdate, Method, PCGrad, build_method
from digrap_scale.method import statistics as S
from digrap_scale.method.strength import Strength, normalize
from digrap_scale.types import ShardSpec, ShardView


def views_of(seed: int, sizes: tuple[int, ...] = (1, 7, 40), *, conflict: bool | None = None) -> list[ShardView]:
    """Layers with random weight, gradient, reference and previous; ``conflict`` fixes the sign of ⟨g, d⟩."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for number, size in enumerate(sizes):
        weight, grad, reference, previous = (torch.randn(size, generator=generator) for _ in range(4))
        if conflict is not None and (float(grad @ (weight - reference)) < 0) != conflict:
            grad.neg_()
        views.append(
            ShardView(
                ShardSpec(f"l{number}", (size,), 0, size),
                weight,
                grad,
                reference=reference,
                projected=True,
                previous=previous,
            )
        )
    return views


def step(method: Method, views: list[ShardView], lr: float = 0.1) -> torch.Tensor:
    """One pre hook's worth of work; the statistics of the gradient before it was changed."""
    stats_LK = method.statistics(views)
    method.update(stats_LK, torch.full((len(views),), lr, dtype=torch.float64))
    method.apply_(views, range(len(views)), 1.0)
    return stats_LK


def prepared(method: Method, layers: int = 3) -> Method:
    method.prepare(torch.ones(layers, dtype=torch.bool))
    return method


class TestStrength:
    def test_is_torchs_adam_clipped(self) -> None:
        layers, steps, lr = 4, 25, 0.03
        generator = torch.Generator().manual_seed(0)
        strength = Strength(layers, lr)
        parameter = torch.zeros(layers, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([parameter], lr=lr)
        for _ in range(steps):
            h = torch.randn(layers, generator=generator, dtype=torch.float64) - 0.3
            strength.update(h, torch.ones(layers, dtype=torch.bool))
            parameter.grad = h.clone()
            adam.step()
            with torch.no_grad():
                parameter.clamp_(0, 1)
            torch.testing.assert_close(strength.value_L.double(), parameter.detach(), atol=1e-6, rtol=0)
        assert 0 < float(strength.value_L.max()) < 1

    def test_first_step_moves_by_mu_against_the_sign(self) -> None:
        strength = Strength(3, 0.01)
        strength.update(torch.tensor([-2.0, 5.0, 0.0], dtype=torch.float64), torch.ones(3, dtype=torch.bool))
        torch.testing.assert_close(strength.value_L, torch.tensor([0.01, 0.0, 0.0]))

    def test_stays_between_0_and_1(self) -> None:
        strength = Strength(2, 0.5)
        for _ in range(5):
            strength.update(torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool))
        assert strength.value_L.tolist() == [1.0, 0.0]

    def test_mask_keeps_a_layer_at_zero(self) -> None:
        strength = Strength(2, 0.5)
        strength.update(torch.tensor([-1.0, -1.0], dtype=torch.float64), torch.tensor([True, False]))
        assert strength.value_L.tolist() == [0.5, 0.0] and strength.second_moment_L[1] == 0

    def test_a_saved_state_continues_bit_for_bit(self) -> None:
        generator = torch.Generator().manual_seed(1)
        hs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        mask = torch.ones(3, dtype=torch.bool)
        straight, first, second = Strength(3, 0.1), Strength(3, 0.1), Strength(3, 0.1)
        for h in hs:
            straight.update(h, mask)
        for h in hs[:5]:
            first.update(h, mask)
        second.load(first.state())
        first.value_L.fill_(9)  # a state is a copy
        for h in hs[5:]:
            second.update(h, mask)
        for key, value in straight.state().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state()[key])), key

    @pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
    def test_refuses_a_learning_rate(self, lr: float) -> None:
        with pytest.raises(ValueError, match="strength_lr must be positive"):
            Strength(1, lr)


def test_normalize() -> None:
    assert normalize(torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]
    assert normalize(torch.tensor([3.0, -4.0], dtype=torch.float64)).tolist() == pytest.approx([0.6, -0.8])
    assert normalize(torch.zeros(0, dtype=torch.float64)).shape == (0,)


@pytest.mark.parametrize("normalization", ["layers", "cosine", "none"])
@pytest.mark.parametrize("hypergradient", ["all", "conflicts"])
def test_hypergradient(normalization: str, hypergradient: str) -> None:
    """h = α_{t-1} ⟨g_t, c_{t-1} d_{t-1}⟩ from vectors in float64, normalised as the option says."""
    method = prepared(DiGraP(0.1, normalization, hypergradient))
    first = views_of(2)
    lrs = torch.tensor([0.1, 0.02, 0.3], dtype=torch.float64)
    before = [(v.grad.double().clone(), (v.weight - v.reference).double()) for v in first]
    method.update(method.statistics(first), lrs)
    second = views_of(3)
    for old, new in zip(first, second, strict=True):  # one trajectory: same reference, previous = the old weight
        new.reference, new.previous = old.reference, old.weight
    got = method._hypergradient(method.statistics(second))
    h, sizes = [], []
    for (g, d), view, lr in zip(before, second, lrs.tolist(), strict=True):
        p = float(g @ d) / float(d @ d) * d
        value = lr * float(view.grad.double() @ p)
        if hypergradient == "conflicts" and float(g @ d) >= 0:
            value = 0.0
        h.append(value)
        sizes.append(lr * float(view.grad.double().norm() * p.norm()))
    total = math.sqrt(sum(value**2 for value in h))
    expected = {
        "layers": [value / total for value in h],
        "cosine": [value / size for value, size in zip(h, sizes, strict=True)],
        "none": h,
    }[normalization]
    assert got.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert any(expected)


def test_cosine_of_nothing_is_zero() -> None:
    method = prepared(DiGraP(0.1, "cosine"))
    zeros = torch.zeros(3, S.GRADIENT_STATISTICS, dtype=torch.float64)
    method.update(zeros, torch.zeros(3, dtype=torch.float64))
    method.update(zeros, torch.zeros(3, dtype=torch.float64))
    assert method.strength().tolist() == [0, 0, 0]


def test_first_step_leaves_the_gradient_alone() -> None:
    method, views = prepared(DiGraP(1.0)), views_of(4, conflict=True)
    before = [view.grad.clone() for view in views]
    step(method, views)
    assert all(torch.equal(view.grad, grad) for view, grad in zip(views, before, strict=True))
    assert method.conflict().all() and method.strength().tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    omega=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    conflict=st.sampled_from([True, False, None]),
)
def test_norm_after_projection(seed: int, omega: list[float], conflict: bool | None) -> None:
    """‖g̃‖² = ‖g‖² − (2ω − ω²)·⟨g,d⟩²/‖d‖² where ⟨g, d⟩ < 0, ‖g‖² elsewhere."""
    views = views_of(seed, conflict=conflict)
    method = prepared(DiGraP(1e-9))
    method.omega.value_L = torch.tensor(omega)
    stats_LK = step(method, views)
    for row, view, strength in zip(stats_LK.tolist(), views, omega, strict=True):
        inner, square, whole = row[S.GRAD_DISPLACEMENT], row[S.DISPLACEMENT_SQ], row[S.GRAD_SQ]
        expected = whole - (2 * strength - strength**2) * inner**2 / square if inner < 0 else whole
        assert float(view.grad.double().square().sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5 * whole)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_strength_one_is_pcgrad(seed: int) -> None:
    ours, theirs = views_of(seed), views_of(seed)
    method = prepared(DiGraP(1e-9))
    method.omega.value_L = torch.ones(3)
    step(method, ours)
    pcgrad = prepared(PCGrad())
    stats_LK = step(pcgrad, theirs)
    for a, b, row in zip(ours, theirs, stats_LK.tolist(), strict=True):
        assert torch.equal(a.grad, b.grad)
        after = float(a.grad.double() @ (a.weight - a.reference).double())
        if row[S.GRAD_DISPLACEMENT] < 0:  # what is left is orthogonal to d
            assert abs(after) < 1e-5 * math.sqrt(row[S.GRAD_SQ] * row[S.DISPLACEMENT_SQ])


def test_no_displacement_no_projection() -> None:
    """θ = θ₀: c is 0, not 0/0."""
    for method in (DiGraP(0.5), PCGrad(), DiGraPUpdate(0.5)):
        prepared(method)
        for _ in range(2):
            views = views_of(5)
            for view in views:
                view.weight.copy_(view.reference)
                view.previous.copy_(view.reference)
            grads = [view.grad.clone() for view in views]
            step(method, views)
            assert all(torch.equal(view.grad, grad) for view, grad in zip(views, grads, strict=True))
            if method.acts_on_update:
                method.apply_update_(views, range(3), method.update_statistics(views))
                assert all(torch.equal(view.weight, view.reference) for view in views)
        assert not method.conflict().any()


@pytest.mark.parametrize("omega", [0.0, 0.4, 1.0])
def test_update_form(omega: float) -> None:
    """a > 0: θ = θ_new − ω·a·d, so that the step's component along d shrinks by (1 − ω); other layers stay."""
    method, views = prepared(DiGraPUpdate(1e-9)), views_of(6)
    method.omega.value_L = torch.full((3,), omega)
    for view in views:
        view.previous, view.weight = view.weight, view.weight + 0.1 * view.grad
    at_start = [ShardView(v.spec, v.previous, v.grad, reference=v.reference, projected=True) for v in views]
    method.update(method.statistics(at_start), torch.ones(3, dtype=torch.float64))
    new = [view.weight.clone() for view in views]
    method.apply_update_(views, range(3), method.update_statistics(views))
    away = 0
    for view, weight in zip(views, new, strict=True):
        d, u = (view.previous - view.reference).double(), (weight - view.previous).double()
        along = float(u @ d)
        expected = weight.double() - (omega * along / float(d @ d) * d if along > 0 else 0)
        torch.testing.assert_close(view.weight.double(), expected, atol=1e-6, rtol=0)
        away += along > 0
    assert int(method.conflict().sum()) == away and 0 < away < 3


def test_update_form_hypergradient() -> None:
    """−⟨g_t, a_{t-1} d_{t-1}⟩ of the layers projected at t−1, 0 elsewhere; over the norm."""
    method, views = prepared(DiGraPUpdate(0.1)), views_of(6)
    for view in views:
        view.previous, view.weight = view.weight, view.weight + 0.1 * view.grad
    at_start = [ShardView(v.spec, v.previous, v.grad, reference=v.reference, projected=True) for v in views]
    method.update(method.statistics(at_start), torch.ones(3, dtype=torch.float64))
    method.apply_update_(views, range(3), method.update_statistics(views))
    a = method.coefficient_L.clone()
    for view in views:
        view.grad = -view.grad.roll(1)
    h = torch.stack([-a[i] * (v.grad.double() @ (v.previous - v.reference).double()) for i, v in enumerate(views)])
    method.update(method.statistics(views), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(method.omega.first_moment_L.double(), 0.1 * h / h.norm(), atol=1e-6, rtol=1e-5)


def test_l2sp_pulls_towards_the_reference() -> None:
    method, views = prepared(L2SP(0.3)), views_of(7)
    views[2].grad.zero_()  # a layer that the loss does not reach
    expected = [v.grad + 0.3 * (v.weight - v.reference) for v in views[:2]] + [torch.zeros(40)]
    step(method, views)
    for view, want in zip(views, expected, strict=True):
        torch.testing.assert_close(view.grad, want)


@pytest.mark.parametrize("name", METHODS)
def test_registry(name: str) -> None:
    needed = {"weight": {"weight": 0.1}, "head": {"head": ["head"]}, "both": {"head": ["head"], "probe_steps": 3}}
    options = needed.get({"l2sp": "weight", "spd": "weight", "linear_probe": "head", "lp_ft": "both"}.get(name, ""), {})
    method = build_method(name, **options)
    assert method.name == name and type(method) is METHODS[name]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digrab", {}, "expected one of none, digrap, .*, ftp, .*found 'digrab'"),
        ("digrap", {"strength": 1}, "method digrap:.*'strength'"),
        ("digrap", {"strength_lr": 0.0}, "strength_lr must be positive, found 0.0"),
        ("digrap", {"normalization": "l2"}, "normalization must be one of .*'l2'"),
        ("digrap", {"hypergradient": "some"}, "hypergradient must be one of .*'some'"),
        ("digrap_update", {"strength_lr": -1.0}, "strength_lr must be positive, found -1.0"),
        ("l2sp", {}, "method l2sp:.*'weight'"),
        ("l2sp", {"weight": -0.1}, "weight must not be negative, found -0.1"),
        ("spd", {"weight": float("nan")}, "weight must not be negative, found nan"),
        ("ftp", {"annealing": 2.0}, "annealing must be from 0 to 1, found 2.0"),
        ("pcgrad", {"weight": 1.0}, "method pcgrad:"),
        ("none", {"weight": 1.0}, "method none:"),
    ],
)
def test_registry_refuses(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_method(name, **options)
    assert "\n" not in str(caught.value)


def test_states_are_copies() -> None:
    for method in (DiGraP(0.1), DiGraPUpdate(0.1), SPD(0.1), PCGrad(), L2SP(0.1), Method()):
        prepared(method)
        step(method, views_of(8))
        kept = {key: torch.as_tensor(value).clone() for key, value in method.state().items()}
        state = method.state()
        step(method, views_of(9))
        assert all(torch.equal(torch.as_tensor(state[key]), value) for key, value in kept.items()), method.name


@pytest.mark.parametrize("method", [PCGrad(), DiGraP()])
def test_a_displacement_too_small_to_square(method: Method) -> None:
    """‖d‖² underflows to 0: no direction to project on, and nothing to divide by."""
    spec = ShardSpec("l", (2,), 0, 2)
    view = ShardView(spec, torch.full((2,), 1e-25), torch.full((2,), -1e-3), projected=True)
    method.prepare(torch.tensor([True]))
    stats_LK = method.statistics([view])
    assert stats_LK[0, S.GRAD_DISPLACEMENT] < 0 and stats_LK[0, S.DISPLACEMENT_SQ] == 0
    method.update(stats_LK, torch.tensor([0.1], dtype=torch.float64))
    method.apply_([view], [0], 1.0)
    assert torch.equal(view.grad, torch.full((2,), -1e-3)) and not method.conflict().any()
