"""Read a comparison's YAML with the strictness of a run's config: every problem at once, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from digrap_scale.compare.schema import GridConfig
from digrap_scale.config import strict_yaml
from digrap_scale.config.describe import describe, is_section, members, nearest, type_at
from digrap_scale.config.raw import MAX_SHOWN, Raw, dotted, one_line, read_text
from digrap_scale.config.rules import Path
from digrap_scale.config.strict_yaml import YamlError
from digrap_scale.errors import ConfigError

WISE_FT, ZERO_SHOT = "WiSE-FT", "zero-shot"
# What makes runs comparable is the same for all methods.
_COMMON = ("run", "data", "evaluation")


def load_grid(path: str) -> GridConfig:
    """The comparison in the file ``path``.

    Raises:
        ConfigError: with a line for each problem. Those of the runs' configs come with ``grid.make_trial``.
    """
    name = one_line(path)
    try:
        document = strict_yaml.read(read_text(path, name))
    except YamlError as error:
        raise ConfigError(f"{name}:{error.line}: {one_line(error.message)}") from None
    if not isinstance(document.data, dict):
        raise ConfigError(f"{name}:1: expected a mapping of the keys {', '.join(GridConfig.model_fields)}")
    raw = Raw(name, document.data)
    raw.take(document, (), None)
    grid: GridConfig | None = None
    try:
        grid = GridConfig.model_validate(raw.data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            _explain(item, raw)
    if grid is not None:
        for where, message in _cross_field(grid):
            raw.complain(where, f"{dotted(where)}: {message}")
    if grid is None or raw.problems:
        raise ConfigError(raw.report())
    return grid


def _explain(item: Any, raw: Raw) -> None:
    path, value = _written(item["loc"], raw.data)
    if path in raw.refused:
        return
    if item["type"] == "extra_forbidden":
        owner = type_at(path[:-1], raw.data, GridConfig)
        known = [
            key for member in members(owner[0] if owner else None) if is_section(member) for key in member.model_fields
        ]
        near = nearest(str(path[-1]), known)
        hint = f"did you mean `{near}`?" if near else f"known: {', '.join(known)}"
        raw.complain(path, f"unknown key `{dotted(path)}`; {hint}")
        return
    if item["type"] == "missing":
        path = (*path, item["loc"][-1])
    annotation, metadata = type_at(path, raw.data, GridConfig) or (None, ())
    expected = describe(annotation, metadata) if annotation is not None else "another value"
    found = "nothing"
    if item["type"] != "missing":
        kind = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else None
        found = kind or f"`{one_line(raw.texts.get(path, str(value)), MAX_SHOWN)}`"
    raw.complain(path, f"{dotted(path)}: expected {expected}, found {found}")


def _written(loc: tuple[str | int, ...], data: Any) -> tuple[Path, Any]:
    """The part of pydantic's location that the user wrote, and the value there."""
    path: Path = ()
    current: Any = data
    for part in loc:
        in_mapping = isinstance(current, dict) and part in current
        in_list = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if in_mapping or in_list:
            current, path = current[part], (*path, part)
    return path, current


def _cross_field(grid: GridConfig) -> Iterable[tuple[Path, str]]:
    names = ", ".join(grid.methods)
    if grid.baseline not in grid.methods:
        yield ("baseline",), f"expected one of the methods ({names}), found `{grid.baseline}`"
    if grid.wise_ft is not None and grid.wise_ft.of not in grid.methods:
        yield ("wise_ft", "of"), f"expected one of the methods ({names}), found `{grid.wise_ft.of}`"
    for key, values in (("seeds", grid.seeds), ("alphas", grid.wise_ft.alphas if grid.wise_ft else [])):
        if len(set(values)) < len(values):
            yield (key,) if key == "seeds" else ("wise_ft", key), "expected each value once, found one again"
    if grid.search_seeds > len(grid.seeds):
        yield ("search_seeds",), f"expected at most the {len(grid.seeds)} of `seeds`, found {grid.search_seeds}"
    if grid.executor.name == "local":
        for key in sorted(grid.executor.model_fields_set & {"cluster", "timeout_minutes", "parameters"}):
            yield ("executor", key), "expected nothing with executor.name `local`, found a value; it is submitit's"
    for key, values in grid.shared_search.items():
        yield from _common(key, ("shared_search", key))
        yield from _values(values, ("shared_search", key))
    for name, entry in grid.methods.items():
        where: Path = ("methods", name)
        if name in (WISE_FT, ZERO_SHOT):
            yield where, f"expected another name, found `{name}`, which is that of a row that needs no training"
        for part, keys in (("overrides", entry.overrides), ("search", entry.search)):
            for key in keys:
                yield from _common(key, (*where, part, key))
                if key in grid.shared_search:
                    yield (*where, part, key), "expected it in `shared_search` or here, found it in both"
        for key, values in entry.search.items():
            yield from _values(values, (*where, "search", key))
            if key == "optimizer.learning_rate":
                yield (
                    (*where, "search", key),
                    "expected the learning rate in `shared_search`: its range is that of all methods",
                )


def _values(values: list[Any], where: Path) -> Iterable[tuple[Path, str]]:
    for number, value in enumerate(values):
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict) for part in value)):
            yield (
                (*where, number),
                "expected a number, a text or a list, found a mapping; search its keys, or add a method",
            )


def _common(key: str, where: Path) -> Iterable[tuple[Path, str]]:
    if key.split(".")[0] in _COMMON:
        yield (
            where,
            f"expected no key of {', '.join(_COMMON)}, which are alike for all methods; put it in `base` or `domains`",
        )
