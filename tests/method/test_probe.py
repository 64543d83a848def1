"""Linear probing, alone and before fine-tuning: what rests, what starts anew."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import digrap_scale
from digrap_scale.errors import ConfigError
from digrap_scale.method import LPFT, LinearProbe
from digrap_scale.projector.attach import _check_resting
from digrap_scale.sharding.zero import Place, ZeroBackend
from digrap_scale.types import ShardSpec
from tests.distributed.toy import Toy, make_batches, make_toy
from tests.distributed.training_runs import make_optimizer

HEAD = ["^head"]
Run = tuple[Toy, torch.optim.Optimizer, digrap_scale.Projector]


def attached(method: str = "lp_ft", **options: Any) -> Run:
    model = make_toy()
    optimizer = make_optimizer(model)
    return model, optimizer, digrap_scale.attach(model, optimizer, method=method, head=HEAD, **options)


def steps(run: Run, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` − 1, the same batches in every run."""
    model, optimizer, _ = run
    for x, y in make_batches(last, 12)[first:]:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run[0].named_parameters()}


def test_only_the_head_moves_while_probing_and_nothing_else_has_a_state() -> None:
    run = attached(probe_steps=4)
    before = weights(run)
    steps(run, 0, 4)
    moved = {name for name, w in weights(run).items() if not torch.equal(w, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert {id(p) for p in run[1].state} == {id(run[0].head.weight), id(run[0].head.bias)}
    assert run[2].report.grad_norm == pytest.approx(norm_of_head(run[0], 3), rel=1e-5), "a norm of what trains"
    steps(run, 4, 5)
    assert {float(state["step"]) for state in run[1].state.values()} == {1.0}, "the head's optimizer starts anew, too"
    still = {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}
    assert {n for n, w in weights(run).items() if torch.equal(w, before[n])} == still


def norm_of_head(after: Toy, step: int) -> float:
    """The head's gradient norm at ``step``, from a probe of its own."""
    run = attached("linear_probe")
    steps(run, 0, step)
    x, y = make_batches(step + 1, 12)[step]
    cross_entropy(run[0](x), y).backward()
    return float(torch.cat([run[0].head.weight.grad.flatten(), run[0].head.bias.grad]).norm())


def test_the_second_phase_is_a_second_run() -> None:
    """Bit for bit: a probe, and plain fine-tuning from its weights with an optimizer of its own."""
    run = attached(probe_steps=5)
    steps(run, 0, 11)
    probe = attached("linear_probe")
    steps(probe, 0, 5)
    model = copy.deepcopy(probe[0])
    optimizer = make_optimizer(model)
    second = (model, optimizer, digrap_scale.attach(model, optimizer, method="none"))
    steps(second, 5, 11)
    assert all(torch.equal(w, weights(second)[name]) for name, w in weights(run).items())


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_goes_on_within_each_phase_and_between_them(stop: int) -> None:
    straight, first, second = attached(probe_steps=5), attached(probe_steps=5), attached(probe_steps=5)
    steps(straight, 0, 11)
    steps(first, 0, stop)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    steps(second, stop, 11)
    assert all(torch.equal(w, weights(straight)[name]) for name, w in weights(second).items())


def test_the_second_phase_begins_though_its_first_step_is_skipped() -> None:
    run = attached(probe_steps=2)
    steps(run, 0, 2)
    model, optimizer, projector = run
    x, y = make_batches(3, 12)[2]
    cross_entropy(model(x * torch.nan), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert projector.report.skipped and {float(state["step"]) for state in optimizer.state.values()} == {0.0}
    steps(run, 3, 4)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0} and len(optimizer.state) > 2


def test_a_gradient_that_rests_may_be_anything() -> None:
    """Not finite in the body: no reason to skip a step of the head."""
    run = attached("linear_probe", max_grad_norm=1.0)
    x, y = make_batches(1, 12)[0]
    cross_entropy(run[0](x), y).backward()
    run[0].embed.weight.grad.fill_(torch.nan)
    run[1].step()
    assert not run[2].report.skipped and torch.isfinite(run[0].head.weight).all()
    assert run[0].embed.weight.grad.isnan().all(), "it is there again after the step"


def test_a_flat_partition_rests_as_a_whole_or_not_at_all() -> None:
    backend = ZeroBackend.__new__(ZeroBackend)
    backend.name = "zero2"
    backend.specs = [ShardSpec(name, (2,), 0, 2) for name in ("body", "head", "other")]
    backend._place = [Place(0, 0, 0, 2), Place(0, 2, 1, 2), Place(1, 0, 0, 2)]
    assert backend.together({2}) is None and backend.together({0, 1}) is None and backend.together({0}) == (0, 1)
    method = LPFT(["head"], 3)
    method.prepare(torch.zeros(3, dtype=torch.bool), ["body", "head", "other"])
    with pytest.raises(ConfigError, match="lp_ft on zero2: head trains and body rests.*parameter group of its own"):
        _check_resting(SimpleNamespace(), backend, method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear_probe", {"head": ["heda"]}, "head: 'heda' matches no trained parameter"),
        ("linear_probe", {"head": []}, "head must be a list of regexes"),
        ("linear_probe", {"head": "head"}, "head must be a list of regexes"),
        ("lp_ft", {"head": ["head"]}, "'probe_steps'"),
        ("lp_ft", {"head": ["head"], "probe_steps": 0}, "probe_steps must be positive, found 0"),
        ("lp_ft", {"head": [""], "probe_steps": 2}, "nothing but the head trains"),
    ],
)
def test_refused(method: str, options: dict[str, Any], message: str) -> None:
    model = make_toy()
    with pytest.raises(ConfigError, match=message):
        digrap_scale.attach(model, make_optimizer(model), method=method, **options)


def test_a_probe_of_a_frozen_model_has_nothing_to_hold_back() -> None:
    method = LinearProbe(HEAD)
    method.prepare(torch.zeros(2, dtype=torch.bool), ["head.weight", "head.bias"])
    assert not method.resting().any()
