"""The learning rate over time: warm-up from zero, then constant, linear or cosine."""

from __future__ import annotations

import math
from typing import Any

import torch

from digrap_scale.config.schema import LPFTMethod, MethodConfig, ScheduleConfig
from digrap_scale.errors import ConfigError


def learning_rate_factor(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of ``step`` ÷ peak learning rate.

    With W = warmup_steps, T = total_steps, r = final_learning_rate_ratio, x = (step − W) / (T − 1 − W) cut to [0, 1]:
    step < W: step / W (0 in the first step, the peak at step W); then constant: 1; linear: 1 − (1 − r)·x;
    cosine: r + (1 − r)·(1 + cos πx) / 2. The last step, T − 1, has exactly r; steps beyond it keep r.

    Args:
        step: optimizer steps done so far; 0 is the first step.
        schedule: the config's ``schedule`` section.
        total_steps: optimizer steps of the whole run.
    """
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    span = total_steps - 1 - schedule.warmup_steps
    # a run whose peak is its last step stays at the peak there: decay needs a step to happen in
    progress = min((step - schedule.warmup_steps) / span, 1.0) if span > 0 else float(step > schedule.warmup_steps)
    ratio = schedule.final_learning_rate_ratio
    if schedule.name == "linear":
        return 1 - (1 - ratio) * progress
    return ratio + (1 - ratio) * (1 + math.cos(math.pi * progress)) / 2


class LearningRate:
    """Sets the learning rate of every parameter group before a step, each from its own peak.

    Works for torch optimizers and DeepSpeed engines or optimizers alike (all of them show ``param_groups``), and holds
    no state: the step number says it all, so that a resumed run needs nothing but its step.

    With ``lp_ft`` each of its phases goes through the schedule by itself, the first one with a peak of its own.

    Args:
        optimizer: anything with ``param_groups``, or an engine whose ``optimizer`` has them.
        schedule: the config's ``schedule`` section.
        total_steps: optimizer steps of the whole run.
        method: the config's ``method`` section.

    Attributes:
        probe_steps: length of the first phase; 0 where there is one phase.

    Raises:
        ConfigError: the warm-up is not shorter than the run, or than each of its phases.
    """

    def __init__(
        self, optimizer: Any, schedule: ScheduleConfig, total_steps: int, method: MethodConfig | None = None
    ) -> None:
        self.probe_steps, self._probe_peak = 0, None
        if isinstance(method, LPFTMethod):
            self.probe_steps, self._probe_peak = method.probe_steps, method.probe_learning_rate
        for steps in (total_steps - self.probe_steps, self.probe_steps) if self.probe_steps else (total_steps,):
            if schedule.warmup_steps >= steps:
                what = f"a phase of lp_ft has {steps}" if self.probe_steps else f"the run has {steps}"
                raise ConfigError(
                    f"schedule.warmup_steps is {schedule.warmup_steps}, but {what} steps: the peak would never be reached; "
                    "shorten the warm-up or train longer"
                )
        self._owner = optimizer if hasattr(optimizer, "param_groups") else optimizer.optimizer
        self._schedule = schedule
        self._total_steps = total_steps
        # `initial_lr` (torch's own key) survives the optimizer's state_dict, where `lr` has moved on
        for group in self._owner.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._peaks = [float(group["initial_lr"]) for group in self._owner.param_groups]

    def set(self, step: int) -> float:
        """Sets the learning rates for ``step`` (0 is the first). Returns the largest of the groups' learning rates."""
        probing = step < self.probe_steps
        begin, end = (0, self.probe_steps) if probing else (self.probe_steps, self._total_steps)
        factor = learning_rate_factor(step - begin, self._schedule, end - begin)
        peaks = self._peaks
        if probing and self._probe_peak is not None:
            peaks = [self._probe_peak] * len(peaks)
        for group, peak in zip(self._owner.param_groups, peaks, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(peak * factor)  # in place: compiled and capturable optimizers hold on to the tensor
            else:
                group["lr"] = peak * factor
        return max(peaks) * factor
