"""Which parameters train, and BatchNorm layers that keep their pre-trained statistics."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from digrap_scale.config.schema import LinearProbeMethod, LPFTMethod, MethodConfig, ModelConfig
from digrap_scale.errors import ConfigError
from digrap_scale.models.names import matching, nearest, summary


def apply_freezing(model: nn.Module, model_config: ModelConfig) -> list[str]:
    """Freezes what ``train_only`` leaves out and what ``freeze`` names; unfreezes nothing.

    Returns:
        A line for each regex: what it matched.

    Raises:
        ConfigError: a regex that matches no parameter (nearest names are told); nothing left to train.
    """
    named = dict(model.named_parameters())
    lines, problems = [], []
    keep: set[str] = set()
    frozen: set[str] = set()
    for option, patterns, found in (
        ("model.train_only", model_config.train_only, keep),
        ("model.freeze", model_config.freeze, frozen),
    ):
        for pattern in patterns:
            matched = matching(pattern, named)
            if not matched:
                problems.append(f"{option}: {pattern!r} matches no parameter; nearest: {nearest(pattern, list(named))}")
                continue
            lines.append(f"{option} {pattern!r}: {summary(matched)}")
            found.update(matched)
    if problems:
        raise ConfigError(problems)
    for name, parameter in named.items():
        if name in frozen or (model_config.train_only and name not in keep):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("model.freeze, model.train_only: together they leave no parameter to train")
    return lines


def head_parameters(model: nn.Module, method: MethodConfig, new: Collection[str]) -> set[str]:
    """The parameters that linear probing trains: what ``method.head`` matches, or else what starts ``new``; for other methods
    none.

    Raises:
        ConfigError: nothing starts new, or a regex matches nothing that trains.
    """
    if not isinstance(method, (LinearProbeMethod, LPFTMethod)):
        return set()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not method.head:
        if not new:
            raise ConfigError(
                "method.head: expected regexes of the head's parameters, found none; the checkpoint has a value for each of "
                "the model's, so nothing starts new"
            )
        return set(new)
    found: set[str] = set()
    for pattern in method.head:
        matched = matching(pattern, trained)
        if not matched:
            raise ConfigError(
                f"method.head: {pattern!r} matches nothing that trains; nearest: {nearest(pattern, trained)}"
            )
        found.update(matched)
    return found


def freeze_body(model: nn.Module, method: MethodConfig, head: Collection[str]) -> list[str]:
    """For ``linear_probe``: freezes everything but ``head``. Returns a line that tells what the head is, for ``lp_ft`` too."""
    if isinstance(method, LinearProbeMethod):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in head)
    return [f"method.head: {summary(sorted(head))}"] if head else []


def freeze_batch_norm(model: nn.Module) -> int:
    """Keeps every BatchNorm layer in eval mode for good: its statistics stay, its weight and bias still train.

    ``train`` is replaced on the layer itself. Wrappers (DDP, FSDP2, DeepSpeed) switch modes through their children's
    ``train``, so the layer stays in eval mode inside them too.

    Returns:
        How many layers there are.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.eval()
        layer.train = MethodType(_stay_in_eval, layer)  # type: ignore[method-assign]
    return len(layers)


def _stay_in_eval(layer: nn.Module, mode: bool = True) -> nn.Module:
    """In place of ``Module.train``; the layers have no children."""
    return layer
