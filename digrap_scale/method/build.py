"""The registry: the config's word for a method → its class."""

from __future__ import annotations

from digrap_scale.config.schema import MethodConfig
from digrap_scale.errors import ConfigError
from digrap_scale.method.base import Method
from digrap_scale.method.digrap import DiGraP
from digrap_scale.method.digrap_update import DiGraPUpdate
from digrap_scale.method.l2sp import L2SP
from digrap_scale.method.pcgrad import PCGrad
from digrap_scale.method.spd import SPD

METHODS: dict[str, type[Method]] = {method.name: method for method in (Method, DiGraP, DiGraPUpdate, L2SP, PCGrad, SPD)}


def build_method(name: str, **options: object) -> Method:
    """The method called ``name`` with its ``options`` (the keys of its config section).

    Raises:
        ConfigError: unknown name, or an option that the method does not take.
    """
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    try:
        return METHODS[name](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {name}: {error}") from error


def from_config(config: MethodConfig) -> Method:
    """The method that a config's ``method`` section describes."""
    return build_method(**config.model_dump())
