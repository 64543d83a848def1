"""The registry: the config's word for a method → its class."""

from __future__ import annotations

import re
from collections.abc import Collection

from digrap_scale.config.schema import MethodConfig
from digrap_scale.errors import ConfigError
from digrap_scale.method.base import Method
from digrap_scale.method.digrap import DiGraP
from digrap_scale.method.digrap_update import DiGraPUpdate
from digrap_scale.method.ftp import FTP
from digrap_scale.method.l2sp import L2SP
from digrap_scale.method.pcgrad import PCGrad
from digrap_scale.method.probe import LPFT, LinearProbe
from digrap_scale.method.spd import SPD

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Method, DiGraP, DiGraPUpdate, L2SP, PCGrad, SPD, FTP, LinearProbe, LPFT)
}


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


def from_config(config: MethodConfig, head: Collection[str] = ()) -> Method:
    """The method that a config's ``method`` section describes; ``head``: the names that its ``head`` amounts to."""
    options = config.model_dump(exclude={"probe_learning_rate"})  # the schedule's
    if "head" in options:
        options["head"] = [f"^{re.escape(name)}$" for name in sorted(head)]
    return build_method(**options)
