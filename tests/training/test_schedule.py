from __future__ import annotations

import math

import pytest
import torch

from digrap_scale.config.schema import LPFTMethod, ScheduleConfig
from digrap_scale.errors import ConfigError
from digrap_scale.training.schedule import LearningRate, learning_rate_factor


def factors(total, **schedule):
    return [learning_rate_factor(step, ScheduleConfig(**schedule), total) for step in range(total)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_starts_at_zero_and_reaches_the_peak(name):
    values = factors(20, name=name, warmup_steps=4)
    assert values[:5] == [0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_last_step_has_the_final_ratio(name, ratio):
    schedule = ScheduleConfig(name=name, warmup_steps=3, final_learning_rate_ratio=ratio)
    values = factors(30, name=name, warmup_steps=3, final_learning_rate_ratio=ratio)
    assert values[-1] == pytest.approx(ratio, abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in zip(values[3:], values[4:], strict=False))
    assert learning_rate_factor(1000, schedule, 30) == pytest.approx(ratio, abs=1e-12)


def test_shapes():
    assert factors(5, name="constant") == [1] * 5
    assert factors(5, name="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * x / 4)) / 2 for x in range(5)]
    assert factors(5, name="cosine", final_learning_rate_ratio=0.2) == pytest.approx(expected)


def test_shortest_runs():
    assert factors(1, name="cosine") == [1.0]
    assert factors(2, name="linear", warmup_steps=1) == [0.0, 1.0]


def optimizer(lrs=(0.1, 0.01), tensor=False):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": torch.tensor(lr) if tensor else lr} for lr in lrs]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("tensor", [False, True])
def test_every_group_follows_its_own_peak(tensor):
    inner = optimizer(tensor=tensor)
    held = inner.param_groups[0]["lr"]
    rate = LearningRate(inner, ScheduleConfig(name="linear", warmup_steps=2), 12)
    assert rate.set(1) == pytest.approx(0.05)
    assert [float(group["lr"]) for group in inner.param_groups] == pytest.approx([0.05, 0.005])
    if tensor:
        assert inner.param_groups[0]["lr"] is held


def test_engine_with_an_inner_optimizer():
    class Engine:
        def __init__(self):
            self.optimizer = optimizer()

    engine = Engine()
    LearningRate(engine, ScheduleConfig(name="constant", warmup_steps=4), 8).set(2)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("built_before_loading", [True, False])
def test_resume_keeps_the_peak(built_before_loading):
    schedule = ScheduleConfig(name="cosine")
    first = optimizer()
    LearningRate(first, schedule, 10).set(8)
    second = optimizer()
    if built_before_loading:
        rate = LearningRate(second, schedule, 10)
        second.load_state_dict(first.state_dict())
    else:
        second.load_state_dict(first.state_dict())
        rate = LearningRate(second, schedule, 10)
    assert rate.set(0) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps is 10, but the run has 10 steps"):
        LearningRate(optimizer(), ScheduleConfig(warmup_steps=10), 10)


def test_each_phase_of_lp_ft_goes_through_the_schedule():
    method = LPFTMethod(head=["head"], probe_steps=4, probe_learning_rate=1.0)
    inner = optimizer()
    rate = LearningRate(inner, ScheduleConfig(name="linear", warmup_steps=1), 10, method)
    peak = 0.1
    assert [rate.set(step) for step in range(4)] == pytest.approx([0, 1, 0.5, 0])
    assert {group["lr"] for group in inner.param_groups} == {0.0}
    assert [rate.set(step) for step in range(4, 10)] == pytest.approx(
        [0, peak, 0.75 * peak, 0.5 * peak, 0.25 * peak, 0]
    )
    own = LearningRate(
        optimizer(), ScheduleConfig(name="constant"), 10, method.model_copy(update={"probe_learning_rate": None})
    )
    assert own.set(0) == own.set(9) == pytest.approx(peak)


@pytest.mark.parametrize("probe_steps", [2, 8])
def test_warm_up_longer_than_a_phase(probe_steps):
    method = LPFTMethod(head=["head"], probe_steps=probe_steps)
    with pytest.raises(ConfigError, match="warmup_steps is 2, but a phase of lp_ft has 2 steps"):
        LearningRate(optimizer(), ScheduleConfig(warmup_steps=2), 10, method)
