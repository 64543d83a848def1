"""FTP: rows that shards cut, γ, and what the projection leaves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import digrap_scale
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.method import FTP, rows
from digrap_scale.method.rows import RowSums, row_elements
from digrap_scale.types import ShardSpec, ShardView

SHAPES = ((5, 7), (3, 2, 4), (11,), (1, 6), (), (9, 1))


def test_row_elements() -> None:
    assert [row_elements(shape) for shape in SHAPES] == [7, 8, 11, 6, 1, 1]


def norms_of(tensor: torch.Tensor) -> torch.Tensor:
    """Row-wise L1 norms as the published code takes them: of what dim 0 leaves, of everything where there is only that."""
    return tensor.double().abs().flatten(1).sum(1) if tensor.ndim > 1 else tensor.double().abs().sum().reshape(1)


def cut_into(shapes: Sequence[tuple[int, ...]], cuts: Sequence[Sequence[float]]) -> list[list[ShardSpec]]:
    """Each rank's shards; ``cuts``: of each layer, where one rank's ends and the next one's begins, as shares of it."""
    ranks: list[list[ShardSpec]] = [[] for _ in range(len(cuts[0]) + 1)]
    for number, (shape, of_layer) in enumerate(zip(shapes, cuts, strict=True)):
        numel = int(torch.Size(shape).numel())
        ends = [0, *sorted(round(share * numel) for share in of_layer), numel]
        for rank, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            ranks[rank].append(ShardSpec(f"l{number}", shape, start, stop))
    return ranks


def view_of(spec: ShardSpec, tensor: torch.Tensor) -> ShardView:
    return ShardView(spec, tensor.reshape(-1)[spec.start : spec.stop].clone(), None)


CUTS = st.integers(0, 3).flatmap(
    lambda ranks: st.lists(
        st.lists(st.floats(0, 1), min_size=ranks, max_size=ranks), min_size=len(SHAPES), max_size=len(SHAPES)
    )
)


@settings(max_examples=60, deadline=None)
@given(cuts=CUTS, portion=st.sampled_from([1, 3, 1000]), seed=st.integers(0, 99))
def test_sums_of_cut_rows(cuts: list[list[float]], portion: int, seed: int) -> None:
    """Whatever the intervals (empty ones, many within one row) and the portions, each rank ends with whole rows' sums."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    before = rows.SEGMENT_ELEMENTS
    rows.SEGMENT_ELEMENTS = portion
    try:
        ranks = cut_into(SHAPES, cuts)
        sums = [RowSums(specs, torch.device("cpu")) for specs in ranks]
        for specs, of_rank in zip(ranks, sums, strict=True):
            for layer, spec in enumerate(specs):
                view = view_of(spec, tensors[layer])
                middle = view.weight.numel() // 2  # two portions, as a streamed reference comes
                for piece in (view.part(slice(0, middle)), view.part(slice(middle, None))):
                    for part, slots in of_rank.segments(layer, piece):
                        here = piece.weight[part].view(slots.stop - slots.start, -1)
                        of_rank.sums[slots] += here.abs().sum(1).double()
        edges = torch.stack([of_rank.edges() for of_rank in sums])
        for specs, of_rank in zip(ranks, sums, strict=True):
            largest = of_rank.join(edges)
            for layer, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
                whole = norms_of(tensor)
                assert float(largest[layer]) == pytest.approx(float(whole.max()), rel=1e-5)
                for _, slots in of_rank.segments(layer, view_of(spec, tensor)):
                    first = slots.start - of_rank._slots[layer]
                    expected = whole[first : first + slots.stop - slots.start]
                    torch.testing.assert_close(of_rank.sums[slots], expected, rtol=1e-5, atol=1e-6)
    finally:
        rows.SEGMENT_ELEMENTS = before


def project(method: FTP, weight: torch.Tensor, reference: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A step's end on one layer that is whole on one rank; the projected weights."""
    spec = ShardSpec("l", tuple(weight.shape), 0, weight.numel())
    kept = getattr(method, "kept", torch.zeros(weight.numel()))
    view = ShardView(spec, weight.clone().view(-1), grad.view(-1), 1.0, reference.view(-1), True, kept)
    method.update(method.statistics([view]), torch.ones(1, dtype=torch.float64))
    method.begin_rows([spec], [0], torch.device("cpu"))
    method.measure_rows([view], [0])
    method.join_rows(method.edges().unsqueeze(0))
    method.apply_rows_([view], [0])
    method.kept = kept
    return view.weight.view_as(weight)


def prepared(annealing: float = 1.0) -> FTP:
    method = FTP(annealing)
    method.prepare(torch.tensor([True]))
    return method


def test_first_step_goes_back_to_the_reference_and_rows_are_held() -> None:
    reference, weight = torch.zeros(2, 3), torch.tensor([[0.3, -0.1, 0.2], [0.0, 0.001, 0.0]])
    grad = -weight  # a step away from θ₀ lowers the loss: γ grows
    method = prepared()
    assert project(method, weight, reference, grad).abs().sum(1).tolist() == pytest.approx([1e-8, 1e-8], rel=1e-3)
    # Its first step, with the second step's bias correction: 1e-2 · (0.1/0.19) / √(0.001/0.001999).
    gamma = 1e-8 + 1e-2 * (0.1 / 0.19) / (0.001 / (1 - 0.999**2)) ** 0.5
    held = project(method, weight, reference, grad)
    assert float(method.gamma_L) == pytest.approx(gamma, rel=1e-6)
    torch.testing.assert_close(held[0], weight[0] * gamma / 0.6)  # shortened, not turned
    assert torch.equal(held[1], weight[1])  # within γ: not touched, in any bit


def test_gamma_stays_between_its_bounds() -> None:
    reference, weight = torch.zeros(2, 3), torch.tensor([[0.003, -0.001, 0.002], [0.0, 0.001, 0.0]])
    method = prepared()
    for _ in range(4):
        project(method, weight, reference, -weight)
    assert float(method.gamma_L) == pytest.approx(0.006, abs=1e-7), "above, nothing is projected"
    for _ in range(40):
        project(method, weight, reference, weight)
    assert float(method.gamma_L) == 1e-8


def test_annealing_scales_what_would_shrink_gamma() -> None:
    weight, reference = torch.tensor([[0.3, -0.1]]), torch.zeros(1, 2)
    gammas = {}
    for annealing in (0.0, 1.0):
        method = prepared(annealing)
        for sign in (-1, -1, -1, 1):
            project(method, weight, reference, sign * weight)
        gammas[annealing] = float(method.gamma_L), float(method.first_moment_L)
    assert gammas[0.0][0] > gammas[1.0][0] and gammas[0.0][1] < gammas[1.0][1]


def test_a_layer_without_gradient_is_left_alone() -> None:
    method = prepared()
    weight = torch.tensor([[0.3, -0.1]])
    assert torch.equal(project(method, weight, torch.zeros(1, 2), torch.zeros(1, 2)), weight)
    assert float(project(method, weight, torch.zeros(1, 2), weight).abs().sum()) < 1e-7, "reached, from here on"


def test_bfloat16_weights() -> None:
    """Sums and products in float32; the weights are rounded once."""
    reference = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = (reference.float() + 0.25).bfloat16()
    method = prepared()
    assert torch.equal(project(method, weight, reference, -torch.ones(4, 6).bfloat16()), reference)


def test_a_zero_reference_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="zero for 2 layers .weight, .* ftp puts weights back .* reference='initial'"):
        digrap_scale.attach(model, torch.optim.AdamW(model.parameters()), method="ftp", reference="zero")


def test_values_that_are_not_finite_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    reference = {"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)}
    optimizer = torch.optim.AdamW(model.parameters())
    digrap_scale.attach(model, optimizer, method="ftp", reference=reference)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(CheckpointError, match="weight: its weights or their reference hold values that are not finite"):
        optimizer.step()


@pytest.mark.parametrize("annealing", [-0.1, 1.5, float("nan")])
def test_refuses_annealing(annealing: float) -> None:
    with pytest.raises(ValueError, match="annealing must be from 0 to 1"):
        FTP(annealing)
