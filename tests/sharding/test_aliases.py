"""Flat views that stay: never of another tensor, of other memory, or of memory that nobody else holds."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.optim import AdamW, Optimizer

import digrap_scale
from digrap_scale.errors import ConfigError
from digrap_scale.projector import Projector
from digrap_scale.sharding.aliases import Aliases


def make(seed: int = 0) -> tuple[torch.nn.Module, Optimizer, Projector]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    reference = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
    optimizer = AdamW(model.parameters(), lr=0.02)
    return (
        model,
        optimizer,
        digrap_scale.attach(model, optimizer, reference=reference, method="digrap", strength_lr=0.05),
    )


def step(model: torch.nn.Module, optimizer: Optimizer, number: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
    (model(x) - x[:, :3]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def replace_weights(model: torch.nn.Module, optimizer: Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def replace_state(model: torch.nn.Module, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].clone()


def load_state(model: torch.nn.Module, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def move(model: torch.nn.Module, optimizer: Optimizer) -> None:
    model.double().float()


@pytest.mark.parametrize("change", [replace_weights, replace_state, load_state, move])
def test_replaced_tensors_are_seen(change: Callable[[torch.nn.Module, Optimizer], None]) -> None:
    """Equal values in other memory, between two steps: training goes on as without."""
    results = []
    for changing in (False, True):
        model, optimizer, projector = make()
        for number in range(6):
            if changing and number in (2, 4):
                change(model, optimizer)
            step(model, optimizer, number)
        results.append(([p.detach().clone() for p in model.parameters()], projector.strength()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1] and max(results[0][1].values()) > 0


def test_a_layout_that_changed_at_the_same_address_is_refused() -> None:
    model, optimizer, _ = make()
    step(model, optimizer, 0)
    model[2].weight.data = torch.empty(0).set_(model[2].weight.data.untyped_storage(), 0, (3, 8), (1, 3))
    with pytest.raises(ConfigError, match=r"2\.weight: its memory is not contiguous"):
        step(model, optimizer, 1)


def test_fewer_elements_at_the_same_address_are_another_view() -> None:
    tensor = torch.nn.Parameter(torch.arange(8.0))
    aliases = Aliases(AdamW([tensor]))
    assert len(aliases.flat("weight", 0, tensor)) == 8
    tensor.data = tensor.data[:5]
    assert len(aliases.flat("weight", 0, tensor)) == 5


def test_nothing_is_kept_after_detach() -> None:
    """Neither by the projector nor by a hook of the optimizer; attaching many times leaves no hooks behind."""
    model, optimizer, projector = make()
    step(model, optimizer, 0)
    moments = weakref.ref(optimizer.state[model[0].weight]["exp_avg"].untyped_storage())
    projector.detach()
    for _ in range(3):
        digrap_scale.attach(model, optimizer, method="none").detach()
    replace_state(model, optimizer)
    gc.collect()
    assert moments() is None
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_loading_an_optimizers_state_lets_go_of_the_old_one() -> None:
    model, optimizer, _ = make()
    step(model, optimizer, 0)
    old = weakref.ref(optimizer.state[model[0].weight]["exp_avg"].untyped_storage())
    load_state(model, optimizer)
    gc.collect()
    assert old() is None
