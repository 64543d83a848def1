"""Adam's step taken in the hook: torch's weights, torch's state, and nothing that the user's loop would notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import digrap_scale
from digrap_scale.errors import CheckpointError, ConfigError
from tests.distributed.toy import make_batches, make_theta0, make_toy
from tests.distributed.training_runs import large_layers

BATCHES = make_batches(12, 8)
Make = Callable[..., torch.optim.Optimizer]


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, **options)


def adam(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, **options)


def run(
    make: Make, projection: str | None, method: str = "digrap", steps: int = len(BATCHES), **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Weights, the optimizer's state dict and the projector, after training with (``projection``) or without a method."""
    model = make_toy()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    projector = None
    if projection is not None:
        extra = {"strength_lr": 0.05} if method.startswith("digrap") else {}
        projector = digrap_scale.attach(
            model, optimizer, method=method, reference=make_theta0(model), projection=projection, **extra, **options
        )
    for x, y in BATCHES[:steps]:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer.state_dict(), projector


OPTIMIZERS: dict[str, Make] = {
    "adamw": adamw,
    "adamw fused": lambda p: adamw(p, fused=True),
    "adamw foreach": lambda p: adamw(p, foreach=True),
    "adam": adam,
    "adam betas": lambda p: adam(p, betas=(0.0, 0.9)),
    "adam decoupled": lambda p: adam(p, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("large", [4, None], ids=["large layers", "small layers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_method_it_is_torchs_step(name: str, large: int | None) -> None:
    make = OPTIMIZERS[name]
    plain, state, _ = run(make, None)
    with large_layers(large):
        ours, our_state, _ = run(make, "fused", "none")
    for key, weight in plain.items():
        torch.testing.assert_close(ours[key], weight, atol=2e-6, rtol=0)
    assert state["state"].keys() == our_state["state"].keys(), "a parameter without a gradient has no state"
    for number, expected in state["state"].items():
        got = our_state["state"][number]
        assert list(got) == list(expected) and float(got["step"]) == float(expected["step"]) == len(BATCHES)
        for key, value in expected.items():
            assert got[key].dtype == value.dtype and got[key].device == value.device
            torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("large", [4, None], ids=["large layers", "small layers"])
@pytest.mark.parametrize("method", ["digrap", "digrap_update", "pcgrad"])
@pytest.mark.parametrize("name", ["adamw fused", "adam"])
def test_equals_the_separate_step(name: str, method: str, large: int | None) -> None:
    theta = {"max_grad_norm": 0.3, "not_projected": ["gain"]}  # ω = 1 on one element leaves Adam rounding noise
    separate, _, first = run(OPTIMIZERS[name], "separate", method, **theta)
    with large_layers(large):
        fused, _, second = run(OPTIMIZERS[name], "fused", method, **theta)
    for key, weight in separate.items():
        torch.testing.assert_close(fused[key], weight, atol=5e-6, rtol=0)
    assert second.strength() == pytest.approx(first.strength(), abs=1e-5)
    assert second.report.conflict_rate == first.report.conflict_rate and max(second.strength().values()) > 0.02


def test_a_plain_optimizer_goes_on_from_its_state() -> None:
    """Six fused steps, then six of torch's own on the same state, are twelve of torch's own."""
    plain, _, _ = run(adamw, None)
    model = make_toy()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    projector = digrap_scale.attach(model, optimizer, method="none", projection="fused")
    for step, (x, y) in enumerate(BATCHES):
        if step == 6:
            projector.detach()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), plain[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "skipped"])
def test_gradients_are_there_after_the_step(bad: bool) -> None:
    model = make_toy()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), projection="fused")
    x, y = BATCHES[0]
    cross_entropy(model(x), y).backward()
    if bad:
        model.head.bias.grad[0] = torch.nan
    before = {n: None if p.grad is None else p.grad for n, p in model.named_parameters()}
    optimizer.step()
    assert projector.report.skipped == bad and (len(optimizer.state) == 0) == bad
    assert all(p.grad is before[n] for n, p in model.named_parameters())


def test_schedulers_and_closures_go_on() -> None:
    model = make_toy()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), projection="fused")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for x, y in BATCHES[:4]:
        cross_entropy(model(x), y).backward()
        before = model.embed.weight.detach().clone()
        optimizer.step()
        moved.append(float((model.embed.weight.detach() - before).abs().max()))
        schedule.step()
        optimizer.zero_grad()
    assert projector.report.step == 4 and moved[3] < 0.3 * moved[0]


def test_the_summary_says_how_the_step_is_taken() -> None:
    for projection in ("separate", "fused"):
        model = make_toy()
        optimizer = adamw(list(model.parameters()))
        projector = digrap_scale.attach(model, optimizer, reference="initial", projection=projection)
        assert ("projection in the optimizer's pass" in projector.summary()) == (projection == "fused")


class Wide(torch.nn.Module):
    """One layer that is large by default, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(64, 2100), torch.nn.Linear(2100, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def train_wide(steps: int = 8, clip: float | None = None, **options: Any) -> tuple[Wide, Any]:
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    theta0 = {n: p.detach() * 0.9 for n, p in model.named_parameters()}
    projector = digrap_scale.attach(model, optimizer, reference=theta0, strength_lr=0.05, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 64, generator=generator)
        cross_entropy(model(x), torch.randint(0, 3, (16,), generator=generator)).backward()
        if projector._early is not None:
            assert 0 in projector._early.ready(), "the large layer was not measured during backward"
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert projector._early is None or projector._early.ready() == []
        optimizer.step()
        optimizer.zero_grad()
    return model, projector


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("projection", ["separate", "fused"])
def test_statistics_during_backward_are_the_steps(projection: str, clip: float | None) -> None:
    """Also where the user's own clipping comes between: what was measured before it does not count."""
    late, first = train_wide(clip=clip, projection=projection)
    early, second = train_wide(clip=clip, projection=projection, statistics="backward")
    for a, b in zip(late.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b), "the same operations on the same numbers"
    layers, others = (projector.state_dict()["layers"] for projector in (first, second))
    for key in ("strength", "first_moment", "coefficient"):
        assert layers[key] == others[key]
    assert layers["first_moment"]["up.weight"] != 0, "the large layer's ⟨g, d_{t-1}⟩ was never looked at"


def test_other_micro_batches_are_not_measured() -> None:
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    projector = digrap_scale.attach(model, optimizer, reference="initial", statistics="backward")
    for last in (False, False, True):
        projector.expect_step(last)
        model(torch.ones(2, 64)).sum().backward()
        assert projector._early.ready() == ([0] if last else [])
    projector.detach()
    optimizer.zero_grad()
    model(torch.ones(2, 64)).sum().backward()
    assert projector._early.ready() == [], "detached: backward is plain again"


def unscaled_by_a_scaler(model: Wide, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)


def written_behind_autograd(model: Wide, optimizer: torch.optim.Optimizer) -> None:
    model.up.weight.grad.data.mul_(1 / 1024)


def replaced(model: Wide, optimizer: torch.optim.Optimizer) -> None:
    grad = model.up.weight.grad / 1024
    model.up.weight.grad = None
    model.up.weight.grad = grad


@pytest.mark.parametrize("change", [unscaled_by_a_scaler, written_behind_autograd, replaced])
def test_a_gradient_that_is_changed_without_a_trace_is_measured_again(change: Callable[..., None]) -> None:
    """None of these counts as a write with autograd."""
    seen = []
    for when in ("step", "backward"):
        model = Wide()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        theta0 = {n: p.detach() * 0.9 for n, p in model.named_parameters()}
        projector = digrap_scale.attach(model, optimizer, reference=theta0, statistics=when)
        (model(torch.ones(2, 64)).square().sum() * 1024).backward()
        change(model, optimizer)
        optimizer.step()
        seen.append((projector.report.grad_norm, projector.method.coefficient_L))
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("when", ["step", "backward"])
def test_gradients_that_are_not_contiguous_are_changed(when: str) -> None:
    """They are worked on in copies, which must find their way back."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    digrap_scale.attach(model, optimizer, reference="zero", method="pcgrad", statistics=when)
    weight = model.weight.detach().clone()
    grad = -weight + 0.1 * torch.randn(300, 300)  # pulls away from zero
    (model.weight * grad.t().contiguous().t()).sum().backward()
    model.weight.grad = model.weight.grad.t().contiguous().t()
    assert not model.weight.grad.is_contiguous()
    optimizer.step()
    expected = grad - (grad * weight).sum() / weight.square().sum() * weight
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * expected, atol=1e-5, rtol=0)


def test_all_layers_measured_during_backward() -> None:
    """Nothing is left for the step to measure."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    projector = digrap_scale.attach(model, optimizer, reference="zero", statistics="backward", projection="fused")
    model(torch.ones(2, 300)).square().sum().backward()
    norm = float(model.weight.grad.norm())
    optimizer.step()
    assert projector.report.grad_norm == pytest.approx(norm, rel=1e-5)  # torch's norm is a float32 sum


@pytest.mark.parametrize("projection", ["separate", "fused"])
def test_parameters_that_come_later_are_refused(projection: str) -> None:
    """They would escape projection, clipping and skipped steps; after attaching anew they do not."""
    model = make_toy()
    later = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("later", later)
    first = [p for name, p in model.named_parameters() if p.requires_grad and name != "later"]
    optimizer = adamw(first)
    projector = digrap_scale.attach(model, optimizer, method="none", projection=projection)
    optimizer.add_param_group({"params": [later]})
    x, y = BATCHES[0]
    (cross_entropy(model(x), y) + later.square().sum()).backward()
    before = [p.detach().clone() for p in first]
    with pytest.raises(
        ConfigError, match=r"a parameter of shape \(3,\) that it did not train when attach\(\) was called"
    ):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(first, before, strict=True))
    projector.detach()
    digrap_scale.attach(model, optimizer, method="none", projection=projection)
    optimizer.step()
    assert not torch.equal(later, torch.ones(3))


def test_moments_of_other_strides_are_stepped() -> None:
    """State saved while weights were channels_last, loaded beside contiguous ones: flat views of it must not be copies."""
    torch.manual_seed(0)
    state = None
    moved = {}
    for projection in ("separate", "fused"):
        model = torch.nn.Conv2d(16, 64, 9)
        optimizer = adamw(list(model.parameters()))
        model(torch.ones(1, 16, 9, 9)).sum().backward()
        optimizer.step()
        if state is None:
            state = copy.deepcopy(optimizer.state_dict())
            for key in ("exp_avg", "exp_avg_sq"):
                state["state"][0][key] = state["state"][0][key].to(memory_format=torch.channels_last)
        optimizer.load_state_dict(copy.deepcopy(state))
        digrap_scale.attach(model, optimizer, method="none", projection=projection)
        optimizer.zero_grad()
        (model(torch.ones(1, 16, 9, 9)) * -3).sum().backward()
        optimizer.step()
        moved[projection] = optimizer.state[model.weight]["exp_avg"].clone()
    torch.testing.assert_close(moved["fused"], moved["separate"].contiguous(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", ["projector", "optimizer"])
def test_resume_in_either_order(first: str) -> None:
    """torch makes an optimizer's state by a step of rate 0: it must not hide the moments that then come."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    straight, _, whole = run(adamw, "separate")
    model = make_toy()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(make_toy()), strength_lr=0.05)
    for x, y in BATCHES[:6]:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    theta0 = make_theta0(make_toy())
    saved = (model.state_dict(), get_optimizer_state_dict(model, optimizer), projector.state_dict())
    again = make_toy()
    again.load_state_dict(saved[0])
    other = adamw([p for p in again.parameters() if p.requires_grad])
    resumed = digrap_scale.attach(again, other, reference=theta0, strength_lr=0.05)
    for what in ("projector", "optimizer") if first == "projector" else ("optimizer", "projector"):
        if what == "projector":
            resumed.load_state_dict(saved[2])
        else:
            set_optimizer_state_dict(again, other, optim_state_dict=saved[1], options=StateDictOptions(strict=False))
    for x, y in BATCHES[6:]:
        cross_entropy(again(x), y).backward()
        other.step()
        other.zero_grad()
    assert resumed.strength() == pytest.approx(whole.strength(), abs=1e-6)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.detach(), straight[name], atol=1e-6, rtol=0)


def test_a_state_without_the_weights_before_is_refused() -> None:
    _, _, projector = run(adamw, "separate", steps=2)
    model = make_toy()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    other = digrap_scale.attach(model, optimizer, reference=make_theta0(model))
    with pytest.raises(CheckpointError, match="attach with previous='recomputed'"):
        other.load_state_dict(projector.state_dict())


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """The compiled kernel, a whole run through it."""
    eager, first = train_wide(projection="fused", kernels="eager")
    compiled, second = train_wide(projection="fused", kernels="compile")
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert second.strength() == pytest.approx(first.strength(), abs=1e-5)
