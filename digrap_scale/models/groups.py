"""Parameter groups for torch's optimizers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from digrap_scale.config.schema import OptimizerConfig
from digrap_scale.errors import ConfigError
from digrap_scale.models.names import matching, nearest

DEFAULT_GROUP = "default"


def build_groups(
    model: nn.Module, optimizer_config: OptimizerConfig, apart: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups of the parameters that train: each joins the first group whose regex is found in its name, or the default.

    Args:
        model: the model.
        optimizer_config: has the regexes.
        apart: names that share no group with others: a group that has both is two, with the same settings.

    Returns:
        Dicts of ``params`` (list of parameters), ``lr``, ``weight_decay``, ``name`` (the regex, or ``default``). The
        default group comes last, and is left out if it is empty.

    Raises:
        ConfigError: a regex that matches no parameter, only frozen ones or only an earlier group's; nothing trains.
    """
    config = optimizer_config
    named = dict(model.named_parameters())
    left = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not left:
        raise ConfigError("optimizer: no parameter trains; see model.freeze and model.train_only")
    groups: list[dict[str, Any]] = []
    problems: list[str] = []
    for index, group in enumerate(config.groups):
        option = f"optimizer.groups.{index}.pattern"
        matched = matching(group.pattern, named)
        mine = [name for name in matched if name in left]
        if not matched:
            problems.append(
                f"{option}: {group.pattern!r} matches no parameter; nearest: {nearest(group.pattern, list(named))}"
            )
        elif not mine:
            frozen = sum(not named[name].requires_grad for name in matched)
            taken = len(matched) - frozen
            problems.append(
                f"{option}: {group.pattern!r} is left without a parameter: of {len(matched)} that it matches, {frozen} "
                f"are frozen and {taken} belong to an earlier group"
            )
        lr = config.learning_rate if group.learning_rate is None else group.learning_rate
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        params = [left.pop(name) for name in mine]
        groups.append({"params": params, "lr": lr, "weight_decay": decay, "name": group.pattern})
    if problems:
        raise ConfigError(problems)
    if left:
        rest = {"params": list(left.values()), "lr": config.learning_rate, "weight_decay": config.weight_decay}
        groups.append({**rest, "name": DEFAULT_GROUP})
    own = {id(parameter) for name, parameter in named.items() if name in apart}
    return [part for group in groups for part in _apart(group, own)]


def _apart(group: dict[str, Any], own: Collection[int]) -> list[dict[str, Any]]:
    inside = [parameter for parameter in group["params"] if id(parameter) in own]
    if not inside or len(inside) == len(group["params"]):
        return [group]
    rest = [parameter for parameter in group["params"] if id(parameter) not in own]
    return [{**group, "params": rest}, {**group, "params": inside, "name": f"{group['name']} (head)"}]


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """A line for each group of ``build_groups``: how many parameters it has, and its settings."""
    return [
        f"optimizer group {group['name']!r}: {len(group['params'])} parameters, learning rate {group['lr']:g}, "
        f"weight decay {group['weight_decay']:g}"
        for group in groups
    ]
