"""A comparison's trials: settings of each method within the budget, and the config and folder of every run."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from digrap_scale.compare.load import ZERO_SHOT
from digrap_scale.compare.schema import GridConfig
from digrap_scale.config import Config, dump_config, parse_config
from digrap_scale.config.raw import read_text
from digrap_scale.config.strict_yaml import dump
from digrap_scale.data.order import permutation
from digrap_scale.errors import ConfigError

DEFAULT_DOMAIN = "all"
# A setting: (dotted key, value) of every hyper-parameter, in the order of the file.
Setting = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Trial:
    """One run.

    Attributes:
        seed: of the run; None for weights as they are, which have none.
        setting: values of the hyper-parameters.
        config: of the run.
        folder: holds ``trial.yaml``, ``log.txt``, ``trial.json`` and the run's own folder, ``run``. Its name ends with a hash of
            the config, so another config never finds this one's results.
        verb: ``train`` or ``evaluate``.
    """

    domain: str
    method: str
    setting: Setting
    seed: int | None
    config: Config
    folder: Path
    verb: Literal["train", "evaluate"] = "train"

    @property
    def name(self) -> str:
        """In messages."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.domain}: {self.method}{f' ({describe_setting(self.setting)})' if self.setting else ''}{seed}"


@dataclass(frozen=True)
class Space:
    """A method's search space.

    Attributes:
        values: hyper-parameter → values, the shared ones first.
        settings: those that are tried, in the grid's order.
        size: of the whole grid.
    """

    values: dict[str, list[Any]]
    settings: list[Setting]
    size: int


def describe_setting(setting: Setting) -> str:
    """``learning_rate 0.002, strength_lr 0.1``."""
    return ", ".join(f"{key.split('.')[-1]} {f'{value:g}' if _is_number(value) else value}" for key, value in setting)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def spaces(grid: GridConfig) -> dict[str, Space]:
    """Method → its search space. Of a grid with more than ``budget`` settings as many are drawn, the same whenever asked."""
    found = {}
    for name, entry in grid.methods.items():
        values = {key: [_frozen(v) for v in chosen] for key, chosen in {**grid.shared_search, **entry.search}.items()}
        whole = [tuple(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        drawn = sorted(permutation("digrap-compare", len(whole))[: grid.budget].tolist())
        found[name] = Space(values, [whole[i] for i in drawn], len(whole))
    return found


def domains(grid: GridConfig) -> dict[str, dict[str, Any]]:
    """Domain → what differs in its runs."""
    return grid.domains or {DEFAULT_DOMAIN: {}}


class TrialMaker:
    """Makes the trials of a grid.

    Args:
        grid: the comparison.
        source: its file's name, for messages.

    Raises:
        ConfigError: the base config cannot be read.
    """

    def __init__(self, grid: GridConfig, source: str) -> None:
        self._grid = grid
        self._text = read_text(grid.base, grid.base) if isinstance(grid.base, str) else dump(grid.base)
        self._source = grid.base if isinstance(grid.base, str) else f"{source}: base"
        self._origin = source

    def train(self, domain: str, method: str, setting: Setting, seed: int) -> Trial:
        """A run. Raises: ConfigError: its config is wrong; every problem, a line each."""
        entry, wise = self._grid.methods[method], self._grid.wise_ft
        values: dict[str, Any] = {
            **domains(self._grid)[domain],
            "method": entry.method,
            **entry.overrides,
            **dict(setting),
        }
        values["run.seed"] = seed
        if wise is not None and wise.of == method:
            values["evaluation.interpolate_alphas"] = list(wise.alphas)
        trial = self._trial(domain, method, setting, seed, values, "train")
        if trial.config.evaluation.interpolate_alphas and trial.config.model.new_head:
            raise ConfigError(
                f"{self._origin}: wise_ft: expected nothing with model.new_head; there is nothing to interpolate the head with"
            )
        return trial

    def zero_shot(self, domain: str) -> Trial:
        """The evaluation of the pre-trained weights. Raises: ConfigError: as above."""
        baseline = self._grid.methods[self._grid.baseline]
        values = {**domains(self._grid)[domain], "method": baseline.method, **baseline.overrides}
        trial = self._trial(domain, ZERO_SHOT, (), None, values, "evaluate")
        if trial.config.model.new_head:
            raise ConfigError(
                f"{self._origin}: zero_shot: expected `false` with model.new_head; the head starts at random"
            )
        return trial

    def _trial(
        self,
        domain: str,
        method: str,
        setting: Setting,
        seed: int | None,
        values: Mapping[str, Any],
        verb: Literal["train", "evaluate"],
    ) -> Trial:
        overrides = [f"{key}={_inline(value)}" for key, value in values.items()]
        overrides += ["run.folder=trial", "run.overwrite=true"]
        config = parse_config(self._text, self._source, overrides)
        _refuse_incomparable(config, f"{self._source} in domain {domain}")
        if config.logging.layers_every_steps is None:
            every = config.logging.strength_every_steps
            logging = config.logging.model_copy(update={"layers_every_steps": every})
            config = config.model_copy(update={"logging": logging})
        digest = hashlib.sha256(f"{verb}\n{dump_config(config)}".encode()).hexdigest()[:10]
        name = "-".join([_slug(domain), _slug(method), *([] if seed is None else [f"seed{seed}"]), digest])
        folder = Path(self._grid.out) / "trials" / name
        run = config.run.model_copy(update={"folder": str(folder / "run")})
        return Trial(domain, method, setting, seed, config.model_copy(update={"run": run}), folder, verb)


def _refuse_incomparable(config: Config, where: str) -> None:
    """Raises: ConfigError: a trial of this config would leave nothing to select or compare by."""
    shifts = {entry.shift for entry in config.evaluation.suite}
    problems = []
    if config.data.hold_out is None:
        problems.append(
            "data.hold_out: expected a section with `fraction`, found nothing; settings are selected on what it withholds"
        )
    if not config.evaluation.at_end:
        problems.append("evaluation.at_end: expected `true`, found false; trials are compared by their results")
    if "id" not in shifts:
        problems.append("evaluation.suite: expected a test set with shift `id`, found none")
    if not {"near", "far"} & shifts:
        problems.append("evaluation.suite: expected a test set with shift `near` or `far`, found none")
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])


def _frozen(value: Any) -> Any:
    """A list as a tuple: settings are looked up by their values."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _inline(value: Any) -> str:
    """A value as YAML on one line, as an override takes it."""
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:40] or "x"
