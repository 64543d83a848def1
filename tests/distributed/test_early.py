"""Statistics of backward on shards: whatever changes gradients before the step, they are those of the step. And one choice
of kernels for all ranks, since replicas step for themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import digrap_scale
from digrap_scale.errors import ConfigError
from digrap_scale.method import choice
from digrap_scale.method.native import NativeError
from tests.distributed.ranks import run_ranks
from tests.distributed.training_runs import large_layers

STEPS, TOKENS = 4, 500


class Tagger(nn.Module):
    """An embedding of which a batch touches some rows, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(x))
        return logits


def nothing(model: nn.Module) -> None:
    """Gradients as backward left them."""


def clipped(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def shards_scaled(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.to_local().mul_(0.01)


def an_element_frozen(model: nn.Module) -> None:
    """One element of the dense layer's shard, between those that are sampled."""
    model.head.weight.grad.to_local().view(-1)[1] = 0.0


def unscaled(model: nn.Module) -> None:
    """As GradScaler does it: no counter sees the write."""
    grads = [parameter.grad.to_local() for parameter in model.parameters() if parameter.grad.to_local().numel()]
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros(()), torch.tensor(1 / 64))


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change for change in (nothing, clipped, shards_scaled, an_element_frozen, unscaled)
}


def train(change: str, when: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tagger()
    theta0 = {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in model.named_parameters()}
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    norms, early = [], 0
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    with large_layers(4):
        projector = digrap_scale.attach(model, optimizer, fixed_strength=1.0, reference=theta0, statistics=when)
        for _ in range(STEPS):
            x = torch.randint(0, TOKENS, (16,), generator=generator)
            y = torch.randint(0, 8, (16,), generator=generator)
            cross_entropy(model(x), y).backward()
            CHANGES[change](model)
            early += 0 if projector._early is None else len(projector._early.ready())
            optimizer.step()
            optimizer.zero_grad()
            norms.append(projector.report.grad_norm)
    weights = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    return {"norms": norms, "weights": weights, "early": early}


def train_all() -> dict[str, Any]:
    return {change: {when: train(change, when) for when in ("step", "backward")} for change in CHANGES}


@pytest.mark.parametrize("ranks", [2, 3])
def test_changed_gradients_are_measured_as_they_are(ranks: int, tmp_path: Path) -> None:
    """Equal in every bit to statistics that are taken in the step: the same operations on the same numbers."""
    for found in run_ranks(ranks, tmp_path, train_all):
        for change, ways in found.items():
            step, backward = ways["step"], ways["backward"]
            assert step["norms"] == backward["norms"], change
            for name, weight in step["weights"].items():
                assert torch.equal(weight, backward["weights"][name]), (change, name)
        assert found["nothing"]["backward"]["early"] > 0, "what nobody changed was measured again"
        assert found["clipped"]["backward"]["early"] == 0


def choose(how: str) -> str:
    """The kernels that a replica gets, where the last rank has no compiler."""

    def none() -> None:
        raise NativeError("no C++ compiler")

    if dist.get_rank() == dist.get_world_size() - 1:
        choice.NativeKernels = none  # type: ignore[assignment,misc]
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        return digrap_scale.attach(model, optimizer, reference="initial", kernels=how).method.kernels.name
    except ConfigError as error:
        return str(error)


def test_a_rank_without_a_compiler_decides_for_all(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "auto", choose, "auto") == ["eager", "eager"]
    first, last = run_ranks(2, tmp_path / "native", choose, "native")
    assert first == "attach: kernels: native cannot be built on another rank; use eager"
    assert last == "attach: kernels: native: no C++ compiler; use eager"
