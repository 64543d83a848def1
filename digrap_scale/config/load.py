"""Read a config: strict YAML, overrides, and every error at once, one line each.

A line reads ``FILE:LINE: section.key: expected …, found …``; for a value given on the command line, the override's text
stands in place of the file and line. Paths are dotted, list items by index: ``evaluation.suite.0.name``. A line about a
suite file names that file; its test sets count on from those that the config lists itself.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from ..errors import ConfigError
from . import strict_yaml
from .checks import CROSS_FIELD, cross_field_problems
from .describe import describe, homes, is_section, known_keys, members, nearest, type_at, typed, variants
from .raw import MAX_SHOWN, Origin, Raw, dotted, one_line, read_text
from .rules import Path
from .schema import Config
from .strict_yaml import YamlError
from .suite_file import merge_suite_file

MAX_KEY = 1000  # characters of an override's left side

_NUMBER_LIKE = re.compile(r"[-+]?[0-9][0-9_:.xobA-Fa-f+-]*\Z")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The config in the file ``path``, with ``overrides`` applied.

    Args:
        path: a UTF-8 YAML file.
        overrides: ``section.key=value``; the value is read as YAML; a list item goes by its index
            (``evaluation.suite.0.name=x``); what follows ``reference.rename.`` up to the first ``=`` is one regex.
            Where two set the same key, the last one wins.

    Raises:
        ConfigError: with a line for each problem.
    """
    name = one_line(os.fsdecode(path))
    return parse_config(read_text(path, name), name, overrides)


def parse_config(text: str, source: str = "config", overrides: Sequence[str] = ()) -> Config:
    """As ``load_config``, for a text; ``source`` stands for the file's name in messages."""
    try:
        document = strict_yaml.read(text)
    except YamlError as error:
        raise ConfigError(f"{source}:{error.line}: {one_line(error.message)}") from None
    sections = ", ".join(Config.model_fields)
    if document.data is None:
        raise ConfigError(f"{source}:1: expected the sections {sections}, found an empty file")
    if not isinstance(document.data, dict):
        raise ConfigError(f"{source}:1: expected a mapping of the sections {sections}, found {_kind(document.data)}")
    raw = Raw(source, document.data)
    raw.take(document, (), None)
    for index, override in enumerate(overrides):
        _apply(raw, Origin(index, override))
    merge_suite_file(raw)
    try:
        config: Config | None = Config.model_validate(raw.data)
    except ValidationError as error:
        config = None
        _explain(error, raw)
    if config is None or raw.problems:
        raise ConfigError(raw.report())
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out; ``parse_config`` of it gives an equal Config."""
    return strict_yaml.dump(config.model_dump())


def _apply(raw: Raw, origin: Origin) -> None:
    """Set what one ``section.key=value`` says in ``raw``, or note why it cannot be."""
    key, equals, text = (origin.override or "").partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(key) > MAX_KEY:
        raw.problems.append((origin, "expected section.key=value"))
        return
    try:
        document = strict_yaml.read(text)
    except YamlError as error:
        raw.problems.append((origin, error.message))
        return
    path: Path = ()
    current: Any = raw.data
    for index, part in enumerate(parts):
        annotation = (type_at(path, raw.data) or (None, ()))[0]
        if get_origin(annotation) is dict:
            part = ".".join(parts[index:])
        step: str | int = part
        if isinstance(current, list):
            if not (part.isascii() and part.isdigit() and len(part) < 7 and int(part) < len(current)):
                message = f"{dotted(path)}: expected an index below {len(current)}, found `{part}`"
                raw.problems.append((origin, message))
                return
            step = int(part)
        elif not isinstance(current, dict):
            message = f"{dotted(path)}: expected a mapping of keys, found {_found(path, current, raw)}"
            raw.problems.append((origin, message))
            return
        path = (*path, step)
        if get_origin(annotation) is dict or index == len(parts) - 1:
            break
        if isinstance(current, dict) and current.get(step) is None:
            current[step] = {}
            raw.origins[path] = origin
        current = current[step]
    current[path[-1]] = document.data
    raw.take(document, path, origin)
    raw.origins.setdefault(path, origin)


def _explain(error: ValidationError, raw: Raw) -> None:
    """Put pydantic's errors, and the rules over several keys, into ``raw.problems``."""
    broken: set[Path] = {*raw.refused}
    unknown: list[Path] = []
    missing: list[Path] = []
    wrong: dict[Path, str] = {}
    keys: dict[Path, str] = {}
    for item in error.errors(include_url=False):
        path = _real_path(item["loc"], raw.data, item["type"] == "missing")
        if item["type"] == CROSS_FIELD or path in raw.refused:
            continue
        broken.add(path)
        if item["type"] == "extra_forbidden":
            unknown.append(path)
        elif item["type"] == "missing":
            missing.append(path)
        else:
            reason = item["msg"].removeprefix("Value error, ") if item["type"] == "value_error" else ""
            (keys if item["loc"][-1] == "[key]" else wrong).setdefault(path, reason)
    meant: set[Path] = set()
    for path in unknown:
        message, near = _unknown(path, raw.data)
        raw.complain(path, message)
        parent: Any = raw.data
        for part in path[:-1]:
            parent = parent[part]
        if near and near not in parent:
            meant.add((*path[:-1], near))
    for path in missing:
        if path not in meant:
            raw.complain(path, _missing(path, raw.data))
    for path, reason in keys.items():
        raw.complain(path, f"{dotted(path[:-1])}: expected a regex as key, found text `{path[-1]}` ({reason})")
    for path, reason in wrong.items():
        # A union complains once for each member: the one that got deeper knows best.
        if not any(len(other) > len(path) and other[: len(path)] == path for other in wrong):
            named = path == ("method",) and isinstance(raw.data["method"], dict) and "name" in raw.data["method"]
            raw.complain(("method", "name") if named else path, _wrong(path, reason, raw))
    for path, message in cross_field_problems(_with_defaults(raw.data), broken | meant):
        raw.complain(path, f"{dotted(path)}: {message}")


def _real_path(loc: Iterable[str | int], data: Any, missing: bool) -> Path:
    """pydantic's location without the names of union members, which no user wrote; ``missing``: its end is absent."""
    parts = list(loc)
    if parts[:1] == ["method"]:
        del parts[1:2]
    path: Path = ()
    current: Any = data
    for index, part in enumerate(parts):
        in_mapping = isinstance(current, dict) and part in current
        in_list = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if in_mapping or in_list:
            current = current[part]
            path = (*path, part)
        elif missing and index == len(parts) - 1:
            path = (*path, part)
    return path


def _unknown(path: Path, data: Any) -> tuple[str, str | None]:
    """The message for an unknown key, and the key that was meant."""
    key = str(path[-1])
    known, owner = known_keys(path[:-1], data)
    what = "section" if len(path) == 1 else "key"
    message = f"unknown {what} `{dotted(path)}`" + (f" for {owner}" if owner else "")
    near = nearest(key, known)
    if near:
        return f"{message}; did you mean `{near}`?", near
    elsewhere = [home for home in homes(key) if (home,) != path[:-1]]
    if elsewhere:
        return f"{message}; did you mean `{elsewhere[0]}.{key}`?", None
    return f"{message}; known: {', '.join(known)}", None


def _missing(path: Path, data: Any) -> str:
    annotation, metadata = type_at(path, data) or (None, ())
    if len(path) == 1:
        keys = [name for member in members(annotation) if is_section(member) for name in member.model_fields]
        names = variants(annotation)
        content = f"name ({', '.join(names)})" if names else ", ".join(keys)
        return f"{path[0]}: expected a section with {content}, found nothing"
    expected = describe(annotation, metadata) if annotation is not None else "a value"
    return f"{dotted(path)}: expected {expected}, found nothing"


def _wrong(path: Path, reason: str, raw: Raw) -> str:
    value = raw.data
    for part in path:
        value = value[part]  # type: ignore[index]
    annotation, metadata = type_at(path, raw.data) or (None, ())
    if path == ("method",) and isinstance(value, dict):
        path = ("method", "name")
        annotation, metadata = type_at(path, raw.data) or (None, ())
        if "name" not in value:
            return f"method.name: expected {describe(annotation)}, found nothing"
        value = value["name"]
    if reason and isinstance(value, dict):
        return f"{dotted(path)}: {reason}"
    message = f"{dotted(path)}: expected {describe(annotation, metadata)}, found {_found(path, value, raw)}"
    return message + (f" ({reason})" if reason else _hint(annotation, value))


def _hint(annotation: Any, value: Any) -> str:
    """What the user probably meant, where that can be told."""
    kinds = [typed(member)[0] for member in members(annotation)]
    literals = [str(word) for kind in kinds for word in get_args(kind) if isinstance(word, str)]
    if isinstance(value, str):
        if value in variants(annotation):
            return f"; write `name: {value}` below it"
        near = nearest(value, literals)
        if near:
            return f"; did you mean `{near}`?"
        if bool in kinds and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            return f"; write `{'true' if value.lower() in ('yes', 'on', 'y') else 'false'}`"
        if (int in kinds or float in kinds) and _NUMBER_LIKE.match(value):
            return "; write a plain decimal number without quotes"
    elif int in kinds and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f"; write `{int(value)}`"
    elif str in kinds and isinstance(value, bool | int | float):
        return "; put it in quotes"
    elif isinstance(value, float) and not math.isfinite(value):
        return "; it must be finite"
    elif value is None and any(is_section(kind) for kind in kinds):
        return "; give it keys"
    return ""


def _found(path: Path, value: Any, raw: Raw) -> str:
    """A value as the user wrote it."""
    if isinstance(value, dict | list):
        return _kind(value)
    written = one_line(raw.texts.get(path, "" if value is None else str(value)), MAX_SHOWN)
    if isinstance(value, str):
        return f"text `{written}`"
    return f"`{written}`" if written else "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return ("a" if value else "an empty") + (" mapping" if isinstance(value, dict) else " list")
    return f"`{one_line(str(value), MAX_SHOWN)}`"


def _with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The raw values, with each section's defaults where it says nothing (required keys stay absent)."""
    full: dict[str, Any] = {}
    for name, info in Config.model_fields.items():
        given = data.get(name)
        values = dict(given) if isinstance(given, dict) else {}
        if is_section(info.annotation):
            defaults = {
                key: item.default
                for key, item in info.annotation.model_fields.items()  # type: ignore[union-attr]
                if not item.is_required()
            }
            values = defaults | values
        full[name] = values
    return full
