"""Every problem of a run that shows without training it: config, data, model, all at once."""

from __future__ import annotations

from digrap_scale.config import Config
from digrap_scale.data.check import check_data
from digrap_scale.data.classes import load_classes
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import check_model, describe_model


def validate(config: Config) -> list[str]:
    """Lines that tell what the config's regexes match.

    Raises:
        ConfigError: all problems that were found.
    """
    problems = check_data(config)
    num_classes = None
    if config.data.classes is not None:
        try:
            num_classes = len(load_classes(config.data.classes).names)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    problems += check_model(config, num_classes)
    if problems:
        raise ConfigError(problems)
    return describe_model(config, num_classes)
