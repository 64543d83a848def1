"""A checkpoint is taken up by other numbers of ranks and other backends: the same values, and the same step after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from digrap_scale.checkpoint.layout import listed_files, step_folder
from tests.distributed.ranks import run_ranks
from tests.distributed.reshard_runs import STEPS, first, firsts, native, second, seconds
from tests.distributed.resume_runs import tensors_of

METHODS = ("digrap", "digrap_update", "ftp")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four ranks (fsdp2, zero3, zero2) and of one process, for each method."""
    folder = tmp_path_factory.mktemp("sources")
    cases = {
        f"{backend}-{method}": (backend, method, str(folder / f"{backend}-{method}"))
        for backend in ("fsdp2", "zero3", "zero2")
        for method in METHODS
    }
    run_ranks(4, folder / "ranks", firsts, cases)
    for method in METHODS:
        first("single", method, str(folder / f"single-{method}"))
    return folder


def check_taken_up(source: Path, taken: Path) -> None:
    """What was loaded is what was saved, in every bit; a step later both are where one process would be."""
    saved, again = (tensors_of(step_folder(folder, STEPS)) for folder in (source, taken))
    for key, value in saved.items():
        assert torch.equal(again[key], value), f"{taken.name}: {key}"
    for key in set(again) - set(saved):  # ZeRO keeps moments of layers that never had a gradient
        assert key.startswith("optimizer.state.unused.") and (key.endswith(".step") or not again[key].any()), key
    after, expected = (tensors_of(step_folder(folder, STEPS + 1)) for folder in (taken, source))
    for key, value in expected.items():
        steps = key.startswith("optimizer.state.unused.") and key.endswith(".step")
        if steps or key.startswith("ω.last_step/unused."):
            continue  # a layer without a gradient: ZeRO steps it with zeros, and counts that; torch does not
        torch.testing.assert_close(after[key], value, atol=2e-6, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    moved = [key for key in saved if key.startswith("model.") and not torch.equal(saved[key], after[key])]
    assert len(moved) > 8, "the step did nothing"
    omega = [key for key in saved if key.startswith("ω.")]
    assert omega and any(not torch.equal(saved[key], after[key]) for key in omega), "ω, or what FTP learns, stood still"


def take_up(ranks: int, sources: Path, folder: Path, pairs: list[tuple[str, str]]) -> None:
    cases = {
        f"{source}-{target}-{method}": (target, method, str(sources / f"{source}-{method}"))
        for source, target in pairs
        for method in METHODS
    }
    runs = {name: (*case, str(folder / name)) for name, case in cases.items()}
    if ranks == 1:
        for arguments in runs.values():
            second(*arguments)
    else:
        run_ranks(ranks, folder / "ranks", seconds, runs)
    for name, (_, _, source) in cases.items():
        check_taken_up(Path(source), folder / name)


def test_two_ranks_to_one_process(tmp_path: Path) -> None:
    """The short form of what follows."""
    cases = {
        f"{backend}-{method}": (backend, method, str(tmp_path / f"{backend}-{method}"))
        for backend, method in (("fsdp2", "digrap_update"), ("zero3", "digrap_update"), ("zero3", "ftp"))
    }
    run_ranks(2, tmp_path / "ranks", firsts, cases)
    for name, (_, method, folder) in cases.items():
        second("single", method, folder, str(tmp_path / f"{name}-single"))
        check_taken_up(Path(folder), tmp_path / f"{name}-single")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_deepspeed_s_own_checkpoint(backend: str, tmp_path: Path) -> None:
    """`checkpoint.deepspeed_native`: DeepSpeed's load_checkpoint brings weights and moments back, and ours lists its files."""
    run_ranks(2, tmp_path / "ranks", native, backend, str(tmp_path / "run"))
    saved, again = (tensors_of(step_folder(tmp_path / "run", step)) for step in (STEPS, STEPS + 1))
    kept = [key for key in saved if key.startswith(("model.", "optimizer.")) and not key.endswith(".step")]
    assert len(kept) > 20 and all(torch.equal(again[key], saved[key]) for key in kept)
    files = listed_files(step_folder(tmp_path / "run", STEPS))
    assert any(name.startswith("deepspeed/engine/") and name.endswith("optim_states.pt") for name in files)


@pytest.mark.slow
def test_one_process(sources: Path, tmp_path: Path) -> None:
    take_up(1, sources, tmp_path, [("fsdp2", "single"), ("zero3", "single"), ("zero2", "single")])


@pytest.mark.slow
def test_two_ranks(sources: Path, tmp_path: Path) -> None:
    pairs = [("fsdp2", "fsdp2"), ("zero3", "zero3"), ("fsdp2", "zero3"), ("zero3", "fsdp2"), ("single", "zero3")]
    take_up(2, sources, tmp_path, pairs)


@pytest.mark.slow
def test_three_ranks(sources: Path, tmp_path: Path) -> None:
    pairs = [("fsdp2", "fsdp2"), ("zero3", "zero3"), ("zero2", "zero3"), ("single", "fsdp2"), ("zero3", "zero1"),
             ("fsdp2", "ddp"), ("zero2", "zero2")]  # fmt: skip
    take_up(3, sources, tmp_path, pairs)


@pytest.mark.slow
def test_nine_ranks(sources: Path, tmp_path: Path) -> None:
    """More ranks than most tensors have rows: empty shards everywhere."""
    take_up(9, sources, tmp_path, [("fsdp2", "fsdp2"), ("zero3", "fsdp2")])
