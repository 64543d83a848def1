"""Degree of shift: streamed moments against numpy in one pass, distances, correlations, and what cannot be measured."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from digrap_scale.errors import NonFiniteError
from digrap_scale.evaluation.report import ReportRow, markdown, print_report, read_report, write_report
from digrap_scale.evaluation.shift import Moments, ShiftDegrees, Whitened, measure_shift, pearson, spearman
from digrap_scale.evaluation.suite import SetResult, SuiteResult
from digrap_scale.types import Batch


def vectors(count: int, size: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + offset


def shrunk(covariance: np.ndarray, count: int) -> np.ndarray:
    """OAS, written from the paper's equation 23 in traces; its ρ for a covariance S of n samples in p dimensions."""
    p = len(covariance)
    trace, trace_of_square = np.trace(covariance), np.trace(covariance @ covariance)
    rho = ((1 - 2 / p) * trace_of_square + trace**2) / ((count + 1 - 2 / p) * (trace_of_square - trace**2 / p))
    rho_as_in_scikit_learn = (trace_of_square + trace**2) / ((count + 1) * (trace_of_square - trace**2 / p))
    assert abs(rho - rho_as_in_scikit_learn) < 5 / (p * count), "both are the same up to terms of 1/p"
    rho = min(1.0, rho_as_in_scikit_learn)
    return (1 - rho) * covariance + rho * trace / p * np.eye(p)


def reference(train: torch.Tensor, test: torch.Tensor) -> float:
    """The whole formula in one pass of numpy."""
    z = train.numpy()
    covariance = shrunk(np.cov(z.T, bias=True), len(z))
    centred = test.numpy() - z.mean(axis=0)
    return float(np.mean(np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred))))


def on_ranks(count: int, work: Callable[[int, Callable[[torch.Tensor], None]], Any]) -> list[Any]:
    """``work(rank, reduce_)`` on threads that sum tensors in lockstep."""
    barrier, shared, results = threading.Barrier(count), [torch.empty(0)] * count, [None] * count

    def run(rank: int) -> None:
        def reduce_(tensor: torch.Tensor) -> None:
            shared[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(shared).sum(dim=0)
            barrier.wait()
            tensor.copy_(total)

        try:
            results[rank] = work(rank, reduce_)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [[50], [1, 0, 30, 19], [17, 17, 16]])
def test_streamed_moments(sizes: list[int], offset: float) -> None:
    whole = vectors(50, 6, offset=offset)
    moments = Moments(6)
    for part in whole.split(sizes):
        moments.add(part)
    scatter = (whole - whole.mean(dim=0)).T @ (whole - whole.mean(dim=0))
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, whole.mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(moments.shrunk_covariance(), shrunk((scatter / 50).numpy(), 50), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shares", [[50], [50, 0], [1, 20, 29], [0, 10, 20, 20]])
def test_ranks_together(shares: list[int]) -> None:
    whole, test = vectors(50, 6, offset=100.0), vectors(21, 6, seed=3, offset=101.0)
    parts = whole.split(shares)

    def work(rank: int, reduce_: Callable[[torch.Tensor], None]) -> float:
        moments = Moments(6)
        for batch in parts[rank].split(8):
            moments.add(batch)
        moments.reduce_(reduce_)
        assert moments.count == 50
        return float(Whitened(moments).distances(test).mean())

    for found in on_ranks(len(shares), work):
        assert found == pytest.approx(reference(whole, test), rel=1e-10)


def test_fewer_samples_than_dimensions() -> None:
    """Shrinkage keeps the covariance invertible, and the distance that of the formula."""
    train, test = vectors(5, 30), vectors(9, 30, seed=1)
    moments = Moments(30)
    moments.add(train)
    assert float(Whitened(moments).distances(test).mean()) == pytest.approx(reference(train, test), rel=1e-9)


def test_the_distance_does_not_depend_on_units() -> None:
    train, test = vectors(200, 4), vectors(50, 4, seed=1)
    rotation = torch.linalg.qr(vectors(4, 4, seed=2))[0] * 37.0
    assert reference(train @ rotation, test @ rotation) == pytest.approx(reference(train, test), rel=1e-9)


class Model(torch.nn.Module):
    """Gives back ``z``; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0


def embed(model: Model, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    assert not torch.is_grad_enabled()
    model.calls += 1
    assert batch.labels is not None
    real = batch.labels != -1
    z = batch.inputs["z"]
    return {
        "vision": (z, real),
        "question": (torch.ones_like(z), real),
        "joint": (torch.cat([z, z**2], dim=1), real & (z[:, 0] > -1)),
    }


def batches(z: torch.Tensor, size: int = 8, padding: int = 0) -> list[Batch]:
    """Batches of ``z``, and then batches that do not count."""
    found = [Batch({"z": part}, torch.zeros(len(part), dtype=torch.int64)) for part in z.split(size) if len(part)]
    blank = Batch({"z": torch.full((2, z.shape[1]), 1e6, dtype=z.dtype)}, torch.full((2,), -1))
    return found + [blank] * padding


def test_measured_over_uneven_ranks() -> None:
    train, near, far = vectors(41, 3), vectors(20, 3, seed=1), vectors(20, 3, seed=2, offset=5.0)
    shares = [30, 11]

    def work(rank: int, reduce_: Callable[[torch.Tensor], None]) -> tuple[ShiftDegrees, int]:
        model = Model()
        mine = batches(train.split(shares)[rank])
        loaders = {
            "near": batches(near.split([20, 0])[rank], padding=3 * rank),
            "far": batches(far.split([7, 13])[rank]),
        }
        return measure_shift(model, embed, mine, loaders, device="cpu", reduce_=reduce_), model.calls

    first, second = on_ranks(2, work)
    degrees = first[0]
    assert degrees.of == second[0].of and degrees.notes == second[0].notes
    for name, test in (("near", near), ("far", far)):
        assert degrees.of[name]["vision"] == pytest.approx(reference(train, test), rel=1e-10)
        kept, tested = (z[z[:, 0] > -1] for z in (train, test))
        joint = reference(torch.cat([kept, kept**2], 1), torch.cat([tested, tested**2], 1))
        assert degrees.of[name]["joint"] == pytest.approx(joint, rel=1e-8)
    assert degrees.of["far"]["vision"] > degrees.of["near"]["vision"]
    assert degrees.notes == ["degree of shift, question: the same in every training sample; not measured"]


def test_parts_that_no_sample_has() -> None:
    def no_images(model: Model, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        z, real = embed(model, batch)["vision"]
        return {"vision": (z, real & False), "joint": (z, real)}

    train = vectors(30, 3)
    degrees = measure_shift(Model(), no_images, batches(train), {"a": batches(train)}, device="cpu")
    assert set(degrees.of["a"]) == {"joint"}
    assert degrees.notes == ["degree of shift, vision: 0 training sample(s) have it; not measured"]
    none = measure_shift(Model(), no_images, batches(train[:1]), {"a": batches(train)}, device="cpu")
    assert none.of == {"a": {}} and len(none.notes) == 2


def test_not_finite() -> None:
    train, bad = vectors(30, 3), vectors(30, 3)
    bad[3, 1] = math.nan
    with pytest.raises(NonFiniteError, match="the training set: the vision embeddings are not finite"):
        measure_shift(Model(), embed, batches(bad), {"a": batches(train)}, device="cpu")
    with pytest.raises(NonFiniteError, match="test set a: the vision embeddings are not finite"):
        measure_shift(Model(), embed, batches(train), {"a": batches(bad)}, device="cpu")


@pytest.mark.parametrize(
    ("first", "second", "expected_pearson", "expected_spearman"),
    [
        ([1, 2, 3], [2, 4, 6], 1.0, 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0, -1.0),
        ([1, 2, 3, 4], [1, 4, 9, 1000], np.corrcoef([1, 2, 3, 4], [1, 4, 9, 1000])[0, 1], 1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8320502943, 0.8207826817),  # ties; both as SciPy has them
        ([1, 2], [1, 2], None, None),
        ([1, 1, 1], [1, 2, 3], None, None),
        ([], [], None, None),
    ],
)
def test_correlations(
    first: list[float], second: list[float], expected_pearson: float | None, expected_spearman: float | None
) -> None:
    for found, expected in ((pearson(first, second), expected_pearson), (spearman(first, second), expected_spearman)):
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-4))


def result(scale: float = 1.0, notes: tuple[str, ...] = ()) -> SuiteResult:
    kinds = {
        "val": ("id", "none"),
        "edited": ("near", "vision"),
        "reworded": ("near", "question"),
        "far": ("far", "other"),
    }
    sets = {
        name: SetResult(shift, 0.8 - 0.1 * i, 0.01, 100, {}, modality)  # type: ignore[arg-type]
        for i, (name, (shift, modality)) in enumerate(kinds.items())
    }
    degrees = {name: {"vision": scale * (10.0 + i), "joint": 20.0 - i} for i, name in enumerate(sets)}
    del degrees["edited"]["joint"]
    return SuiteResult(sets).with_shift_degrees(ShiftDegrees(degrees, list(notes)))


def test_correlation_with_accuracy_is_in_the_json() -> None:
    stored = json.loads(json.dumps(result(notes=("question: not measured",)).to_dict()))
    assert stored["sets"]["edited"]["shift_degree"] == {"vision": 11.0}
    assert stored["shift_correlations"]["vision"] == pytest.approx({"pearson": -1, "spearman": -1, "sets": 4})
    assert stored["shift_correlations"]["joint"] == pytest.approx({"pearson": 1, "spearman": 1, "sets": 3})
    back = SuiteResult.from_dict(stored)
    assert back == result(notes=("question: not measured",)) and back.notes == ["question: not measured"]


def test_results_of_before_are_read() -> None:
    """A ``results.json`` without modality, degree of shift and notes."""
    stored = {
        "sets": {"a": {"shift": "id", "accuracy": 0.5, "standard_error": 0.1, "samples": 4, "class_accuracy": {}}}
    }
    assert SuiteResult.from_dict(stored).sets["a"].shift_degree == {}
    assert SuiteResult.from_dict(stored).shift_correlations == {}


@pytest.mark.parametrize("count", [1, 2])
def test_tables_and_picture(count: int, tmp_path: Any) -> None:
    rows = [ReportRow(name, result(i + 1.0, ("a note",))) for i, name in enumerate(["FT", "DiG|raP"][:count])]
    text = markdown(rows, [])
    method = "FT | " if count == 2 else ""
    assert f"| {method}edited | near | vision | 70.0 | 11.00 | – |" in text
    assert (
        f"Accuracy{' of FT' if count == 2 else ''} against d vision over 4 sets: Pearson -1.00, Spearman -1.00." in text
    )
    assert ("- FT: a note" if count == 2 else "- a note") in text
    narrow = Console(file=io.StringIO(), width=60)
    print_report(rows, [], narrow)
    assert "…" not in narrow.file.getvalue()  # type: ignore[attr-defined]
    console = Console(file=io.StringIO(), width=100)
    print_report(rows, ["seed 0"], console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for needed in ("Degree of shift", "reworded", "question", "Spearman -1.00", "a note", "seed 0"):
        assert needed in printed
    written = write_report(rows, tmp_path, notes=[])
    assert (
        "shift.png" in {path.name for path in written}
        and "![shift](shift.png)" in (tmp_path / "results.md").read_text()
    )
    with Image.open(tmp_path / "shift.png") as image:
        image.verify()
    assert read_report(tmp_path / "results.json")[0] == rows


def test_no_degrees_no_table(tmp_path: Any) -> None:
    plain = SuiteResult({"a": SetResult("id", 0.5, 0.1, 4, {})})
    write_report([ReportRow("FT", plain)], tmp_path, notes=[])
    assert not (tmp_path / "shift.png").exists()
    assert "Degree of shift" not in (tmp_path / "results.md").read_text()
