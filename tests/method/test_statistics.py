"""Statistics of shards of any size against a dense float64 computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.method import kernels as K
from digrap_scale.method import statistics as S
from digrap_scale.method.base import add_displacement_
from digrap_scale.method.choice import choose_kernels
from digrap_scale.method.kernels import CompiledKernels, Kernels
from digrap_scale.types import AdamMoments, ShardSpec, ShardView

# Sums of float32 products, in blocks or segments of a few hundred thousand: relative to Σ|a·b|.
RELATIVE = 2e-5
EAGER = Kernels()


def make_view(
    size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = torch.float32,
    reference_dtype: torch.dtype | None = torch.float32,
    projected: bool = True,
    previous: bool = True,
    grad_scale: float = 1.0,
) -> ShardView:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return ShardView(
        ShardSpec(f"layer{seed}", (size,), 0, size),
        draw().to(dtype),
        None if grad_dtype is None else draw().to(grad_dtype),
        grad_scale=grad_scale,
        reference=None if reference_dtype is None else draw().to(reference_dtype),
        projected=projected,
        previous=draw().to(dtype) if previous else None,
    )


def parts(view: ShardView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g, d_t and d_{t-1} in float64."""
    weight = view.weight.double()
    reference = torch.zeros_like(weight) if view.reference is None else view.reference.double()
    grad = torch.zeros_like(weight) if view.grad is None else view.grad.double() * view.grad_scale
    if not view.projected:
        return grad, torch.zeros_like(weight), torch.zeros_like(weight)
    previous = torch.zeros_like(weight) if view.previous is None else view.previous.double() - reference
    return grad, weight - reference, previous


def dense(view: ShardView) -> tuple[torch.Tensor, torch.Tensor]:
    """The four statistics, and the sums of absolute products that bound their rounding."""
    g, now, before = parts(view)
    products = [g * now, now * now, g * before, g * g]
    return torch.stack([p.sum() for p in products]), torch.stack([p.abs().sum() for p in products])


def check(views: list[ShardView], kernels: Kernels = EAGER) -> None:
    got = S.gradient_statistics(views, kernels, with_previous=True)
    assert got.dtype == torch.float64 and got.shape == (len(views), S.GRADIENT_STATISTICS)
    for row, view in zip(got, views, strict=True):
        expected, size = dense(view)
        assert ((row - expected).abs() <= RELATIVE * size).all(), (view.spec, row, expected)


LARGE, BLOCK = 16, 64  # small blocks, so that hypothesis reaches every branch with few elements
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
VIEWS = st.lists(
    st.builds(
        make_view,
        st.sampled_from([0, 1, 2, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]),
        seed=st.integers(0, 99),
        dtype=DTYPES,
        grad_dtype=st.one_of(st.none(), DTYPES),
        reference_dtype=st.one_of(st.none(), DTYPES),
        projected=st.booleans(),
        previous=st.booleans(),
        grad_scale=st.sampled_from([1.0, 1.0, 0.25]),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(K, "LARGE_ELEMENTS", LARGE)
        patch.setattr(K, "PACK_ELEMENTS", BLOCK)
        patch.setattr(K, "BLOCK_ELEMENTS", BLOCK)
        yield


@settings(max_examples=150, deadline=None)
@given(views=VIEWS)
def test_any_mixture_of_layers(small_blocks: None, views: list[ShardView]) -> None:
    check(views)


@settings(max_examples=100, deadline=None)
@given(views=VIEWS)
def test_every_layer_is_walked_once(small_blocks: None, views: list[ShardView]) -> None:
    large, packs = S.pack_small(views)
    for pack in packs:
        assert sum(pack.lengths) <= BLOCK and len({S._kind(view) for view in pack.views}) == 1
        assert pack.lengths == [views[row].weight.numel() for row in pack.layers]
        assert all(a is views[row] for a, row in zip(pack.views, pack.layers, strict=True))
    rows = large + [row for pack in packs for row in pack.layers]
    assert sorted(rows) == [row for row, view in enumerate(views) if view.weight.numel() > 0]
    assert all(views[row].weight.numel() >= LARGE for row in large)


def test_real_block_boundaries() -> None:
    check([make_view(K.BLOCK_ELEMENTS + extra, seed=9 + extra) for extra in (-1, 0, 1)])
    check([make_view(K.LARGE_ELEMENTS + extra, seed=9 + extra) for extra in (-1, 0, 1)])
    check([make_view(K.LARGE_ELEMENTS - 1, seed=seed) for seed in range(K.PACK_ELEMENTS // K.LARGE_ELEMENTS + 2)])


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Whole rows, and what is left of them; every mixture of operands that changes the compiled function."""
    compiled = CompiledKernels()
    for number, options in enumerate(
        [
            {},
            {"grad_dtype": torch.bfloat16},
            {"grad_dtype": None},
            {"reference_dtype": torch.bfloat16},
            {"reference_dtype": None},
            {"previous": False},
            {"projected": False},
            {"dtype": torch.bfloat16},
        ]
    ):
        views = [
            make_view(K.COMPILED_ELEMENTS + extra, seed=number + extra, **options)
            for extra in (0, 1, K.ROW_ELEMENTS - 1)
        ]
        check(views, compiled)
        eager, fused = ([copy_view(view) for view in views] for _ in range(2))
        for kernels, copies in ((EAGER, eager), (compiled, fused)):
            add_displacement_(copies, [0.5, -2.0, 0.0], "grad", kernels, scale=0.5)
            if options.get("previous", True):
                add_displacement_(copies, [0.5, -2.0, 0.0], "weight", kernels, of="previous")
        for a, b in zip(eager, fused, strict=True):
            unit = 2.0**-8 if options.get("dtype") or options.get("grad_dtype") else 2.0**-21
            torch.testing.assert_close(a.weight, b.weight, rtol=unit, atol=2e-6)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=unit, atol=2e-6)
        if options.get("previous", True):
            got, want = (S.update_statistics(views, kernels) for kernels in (compiled, EAGER))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def copy_view(view: ShardView) -> ShardView:
    grad = None if view.grad is None else view.grad.clone()
    return replace(view, weight=view.weight.clone(), grad=grad)


@pytest.mark.parametrize(("choice", "elements", "name"), [("eager", 1 << 30, "eager"), ("auto", 1000, "native")])
def test_choice_of_kernels(choice: str, elements: int, name: str) -> None:
    assert choose_kernels(choice, elements, torch.device("cpu")).name == name
    with pytest.raises(ValueError, match="must be auto, eager, compile or native, found 'fast'"):
        choose_kernels("fast", elements, torch.device("cpu"))


def test_no_layers_and_empty_shards() -> None:
    assert S.gradient_statistics([], EAGER, with_previous=True).shape == (0, S.GRADIENT_STATISTICS)
    assert S.update_statistics([], EAGER).shape == (0, S.UPDATE_STATISTICS)
    empty = [make_view(0), make_view(0, grad_dtype=None), make_view(0, projected=False)]
    assert S.gradient_statistics(empty, EAGER, with_previous=True).tolist() == [[0.0] * 4] * 3


def test_previous_is_looked_at_only_on_demand() -> None:
    view = make_view(10)
    with_it = S.gradient_statistics([view], EAGER, with_previous=True)
    without = S.gradient_statistics([view], EAGER, with_previous=False)
    assert with_it[0, S.GRAD_PREVIOUS] != 0 and without[0, S.GRAD_PREVIOUS] == 0
    assert torch.equal(with_it[:, [0, 1, 3]], without[:, [0, 1, 3]])


@pytest.mark.parametrize("size", [3, 1 << 17])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_shows_in_its_layer_only(size: int, bad: float) -> None:
    views = [make_view(size, seed=seed) for seed in range(3)]
    views[1].grad[-1] = bad
    finite = torch.isfinite(S.gradient_statistics(views, EAGER, with_previous=True)).all(dim=1)
    assert finite.tolist() == [True, False, True]


def test_layers_without_reference_give_the_gradient_norm_only() -> None:
    view = make_view(50, projected=False, reference_dtype=None)
    row = S.gradient_statistics([view], EAGER, with_previous=True)[0]
    assert row[:3].tolist() == [0, 0, 0] and row[3] == pytest.approx(float(view.grad.double().square().sum()), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(views=VIEWS)
def test_update_statistics(small_blocks: None, views: list[ShardView]) -> None:
    views = [view for view in views if view.previous is not None]
    got = S.update_statistics(views, EAGER)
    for row, view in zip(got, views, strict=True):
        _, _, before = parts(view)
        update = (view.weight.double() - view.previous.double()) if view.projected else torch.zeros_like(before)
        for column, product in ((S.UPDATE_DISPLACEMENT, update * before), (S.UPDATE_SQ, update * update)):
            assert abs(float(row[column] - product.sum())) <= RELATIVE * float(product.abs().sum())


@settings(max_examples=100, deadline=None)
@given(views=VIEWS, scale=st.sampled_from([1.0, 0.5]), data=st.data())
def test_adding_displacements(small_blocks: None, views: list[ShardView], scale: float, data: st.DataObject) -> None:
    """x ← scale · x + factor · d, rounded once to x's dtype; nothing else is touched."""
    factors = [data.draw(st.sampled_from([0.0, -1.5, 0.3])) for _ in views]
    expected, kept = [], []
    for view, factor in zip(views, factors, strict=True):
        _, d, _ = parts(view)
        expected.append(None if view.grad is None else scale * view.grad.double() + factor * d)
        kept.append((view.weight.clone(), None if view.reference is None else view.reference.clone()))
    add_displacement_(views, factors, "grad", EAGER, scale=scale)
    for view, want, (weight, reference) in zip(views, expected, kept, strict=True):
        assert torch.equal(view.weight, weight)
        assert view.reference is None or torch.equal(view.reference, reference)
        if want is None:
            assert view.grad is None
            continue
        unit = 2.0**-8 if view.grad.dtype == torch.bfloat16 else 2.0**-21
        torch.testing.assert_close(view.grad.double(), want, rtol=unit, atol=2e-6)


def test_adding_previous_displacement_to_the_weight() -> None:
    views = [make_view(size, seed=size) for size in (3, 70_000)]
    expected = [view.weight.double() - 0.5 * parts(view)[2] for view in views]
    add_displacement_(views, [-0.5, -0.5], "weight", EAGER, of="previous")
    for view, want in zip(views, expected, strict=True):
        torch.testing.assert_close(view.weight.double(), want, rtol=1e-6, atol=1e-6)


def test_scaling_gradients() -> None:
    views = [make_view(4), make_view(4, grad_dtype=None)]
    before = views[0].grad.clone()
    add_displacement_(views, [0.0, 0.0], "grad", EAGER)
    assert torch.equal(views[0].grad, before)
    add_displacement_(views, [0.0, 0.0], "grad", EAGER, scale=0.25)
    assert torch.equal(views[0].grad, before * 0.25) and views[1].grad is None


@pytest.mark.slow
def test_compiled_equals_eager_from_moments() -> None:
    """d_{t-1} from Adam's moments: whole rows, with and without a reference, against float64."""
    generator = torch.Generator().manual_seed(3)
    size = (
        K.COMPILED_ELEMENTS
    )  # whole rows: what is left over goes with small layers (test_compiled_equals_eager has it)
    grad, weight, first = (torch.randn(size, generator=generator) for _ in range(3))
    second = torch.rand(size, generator=generator)
    moments = AdamMoments(first, second, (0.999, 1e-2, 1.3, 1e-8))
    before = (weight.double() + 1e-2 * first.double() / (second.double().sqrt() * 1.3 + 1e-8)) / 0.999
    for reference in (None, (weight + 0.1).bfloat16()):
        d = before if reference is None else before - reference.double()
        want = float((grad.double() * d).sum())
        scale = float((grad.double() * d).abs().sum())
        for kernels in (EAGER, CompiledKernels()):
            factors = K.device_rows([moments.factors], weight.device)[0]
            sums = kernels.gradient_products(grad, weight, reference, None, True, moments, factors)
            assert abs(float(sums[S.GRAD_PREVIOUS]) - want) < 1e-6 * scale, kernels.name
