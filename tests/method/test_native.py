"""The native kernels against float64, against torch's own conversions, and where they cannot be had."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from digrap_scale.method import native
from digrap_scale.method import statistics as S
from digrap_scale.method.adam import adam_
from digrap_scale.method.base import add_displacement_
from digrap_scale.method.choice import choose_kernels
from digrap_scale.method.kernels import Kernels
from digrap_scale.method.native import NativeError, NativeKernels
from digrap_scale.types import AdamMoments, AdamSettings, AdamState
from tests.method.test_statistics import check, copy_view, make_view

# Of a chunk, of a lane, of a block, and one more.
SIZES = (0, 1, 15, 16, 17, 4095, 4097, native.BLOCK_ELEMENTS, native.BLOCK_ELEMENTS + 1, 3 * native.BLOCK_ELEMENTS + 7)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return NativeKernels()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


OPTIONS = (
    {},
    {"reference_dtype": None},
    {"reference_dtype": torch.bfloat16},
    {"reference_dtype": torch.float16},
    {"grad_dtype": None},
    {"grad_dtype": torch.float16, "grad_scale": 0.25},
    {"previous": False},
    {"projected": False},
    {"dtype": torch.bfloat16, "grad_dtype": torch.bfloat16},
    {"dtype": torch.float64, "grad_dtype": torch.float64},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_statistics(kernels: NativeKernels, options: dict) -> None:
    check([make_view(size, seed=i, **options) for i, size in enumerate(SIZES)], kernels)


def test_statistics_from_moments(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(3)
    views, wanted = [], []
    for i, size in enumerate(SIZES):
        view = make_view(size, seed=i, previous=False, reference_dtype=torch.bfloat16)
        first, second = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
        view.moments = AdamMoments(first, second, (0.999, 1e-2 * (i + 1), 1.3, 1e-8))
        before = (
            view.weight.double() + 1e-2 * (i + 1) * first.double() / (second.double().sqrt() * 1.3 + 1e-8)
        ) / 0.999
        product = view.grad.double() * (before - view.reference.double())
        wanted.append((float(product.sum()), float(product.abs().sum())))
        views.append(view)
    got = S.gradient_statistics(views, kernels, with_previous=True)[:, S.GRAD_PREVIOUS].tolist()
    for value, (want, scale) in zip(got, wanted, strict=True):
        assert abs(value - want) <= 1e-6 * scale


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("projected", True)], ids=str)
def test_displacements_and_updates(kernels: NativeKernels, options: dict) -> None:
    views = [make_view(size, seed=i, **options) for i, size in enumerate(SIZES)]
    factors = [0.0 if i == 3 else 0.5 - i for i in range(len(views))]
    changed: list[list] = []
    for one in (kernels, Kernels()):
        copies = [copy_view(view) for view in views]
        add_displacement_(copies, factors, "grad", one, scale=0.5)
        if options.get("previous", True):
            add_displacement_(copies, factors, "weight", one, of="previous")
        changed.append(copies)
    unit = 2.0**-8 if {options.get("dtype"), options.get("grad_dtype")} & set(HALF) else 2.0**-22
    for ours, other in zip(*changed, strict=True):
        torch.testing.assert_close(ours.weight, other.weight, rtol=unit, atol=4e-6)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=unit, atol=4e-6)
    if options.get("previous", True):
        got, want = (S.update_statistics(views, one) for one in (kernels, Kernels()))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(kernels: NativeKernels, decoupled: bool) -> None:
    """A step on many layers with a projection in it, against torch's own on the projected gradient."""
    views = [make_view(size, seed=i, reference_dtype=torch.bfloat16) for i, size in enumerate(SIZES)]
    factors = [0.0 if i % 2 else -0.3 for i in range(len(views))]
    settings = AdamSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled, False)
    parameters = [torch.nn.Parameter(view.weight.clone()) for view in views]
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, lr=1e-2, weight_decay=0.1)
    states = [AdamState(torch.zeros_like(v.weight), torch.zeros_like(v.weight), 0, settings) for v in views]
    for step in (1, 2, 3):
        for parameter, view, factor in zip(parameters, views, factors, strict=True):
            d = parameter.detach() - view.reference.float()
            parameter.grad = 0.5 * view.grad + factor * d
        optimizer.step()
        for state in states:
            state.count = step
        adam_(views, states, factors, 0.5, kernels)
    for parameter, view, state in zip(parameters, views, states, strict=True):
        torch.testing.assert_close(view.weight, parameter.detach(), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(state.second, optimizer.state[parameter]["exp_avg_sq"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_narrow_number_is_read_and_written_as_torch_does(kernels: NativeKernels, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    target, zero = numbers.clone(), torch.zeros(len(numbers))
    kernels.add_displacements_([target], [zero], [None], [0.0], 1.0)
    assert ((target == numbers) | (target.isnan() & numbers.isnan())).all()
    between = torch.cat([torch.randn(100_000) * scale for scale in (1e-41, 1e-8, 1e-6, 1e-5, 1.0, 6e4, 1e38)])
    between = torch.cat([between, numbers.float().nextafter(torch.tensor(9e9)), numbers.float() + 2.0**-25])
    target = torch.zeros(len(between), dtype=dtype)
    kernels.add_displacements_([target], [between], [None], [1.0], 0.0)
    want = between.to(dtype)
    assert ((target == want) | (target.isnan() & want.isnan())).all()


def test_sums_do_not_depend_on_threads(kernels: NativeKernels, threads: None) -> None:
    views = [make_view(size, seed=i) for i, size in enumerate(SIZES)]
    many = S.gradient_statistics(views, kernels, with_previous=True)
    torch.set_num_threads(1)
    assert torch.equal(S.gradient_statistics(views, kernels, with_previous=True), many)


def test_what_is_not_finite_shows(kernels: NativeKernels) -> None:
    for bad in (float("nan"), float("inf")):
        view = make_view(5000)
        view.grad[4321] = bad
        stats = S.gradient_statistics([view], kernels, with_previous=True)
        assert not stats[0, S.GRAD_SQ].isfinite() and stats[0, S.DISPLACEMENT_SQ].isfinite()


def test_no_layers(kernels: NativeKernels) -> None:
    assert S.gradient_statistics([], kernels, with_previous=True).shape == (0, S.GRADIENT_STATISTICS)
    assert S.update_statistics([], kernels).shape == (0, S.UPDATE_STATISTICS)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_library.cache_clear()
    yield tmp_path
    native.load_library.cache_clear()


def test_it_is_built_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.load_library()
    (built,) = (empty_cache / "digrap_scale").iterdir()
    made = built.stat().st_mtime_ns
    native.load_library.cache_clear()
    native.load_library()
    assert [built] == list((empty_cache / "digrap_scale").iterdir()) and built.stat().st_mtime_ns == made


def test_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"native: no C\+\+ compiler: .*; use eager"):
        choose_kernels("native", 1, torch.device("cpu"))
    with pytest.warns(UserWarning, match="eager kernels take the place of native ones"):
        assert choose_kernels("auto", 1, torch.device("cpu")).name == "eager"


def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(NativeError, match=r"failed on broken.cpp: .*error"):
        native.load_library()
    assert not list((empty_cache / "digrap_scale").iterdir()), "nothing half-built is left"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(NativeError, match="cannot be built or loaded"):
        native.load_library()


def test_it_is_for_the_cpu() -> None:
    with pytest.raises(ValueError, match="native works on the CPU, the shards are on cuda; use compile or auto"):
        choose_kernels("native", 1, torch.device("cuda"))


def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    command = [*native._compiler(), *native._FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*command, str(native.SOURCE), "-o", str(tmp_path / "x.so")], check=True)
