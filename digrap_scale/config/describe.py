"""The schema in words: types for messages and for the reference, keys at a path, the nearest known key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from .rules import Path
from .schema import Config, Section, check_regex

Typed = tuple[Any, tuple[Any, ...]]  # (annotation, metadata)


def typed(annotation: Any, metadata: Iterable[Any] = ()) -> Typed:
    """``annotation`` without ``Annotated`` and the like, and all of its metadata, flat."""
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        flat = [*typed(None, more)[1], *flat]
    return annotation, tuple(flat)


def field_type(field: FieldInfo) -> Typed:
    """A field's annotation and metadata."""
    return typed(field.annotation, field.metadata)


def members(annotation: Any) -> list[Any]:
    """The members of a union without None; else the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if member is not types.NoneType]
    return [annotation]


def is_section(annotation: Any) -> bool:
    """Whether the annotation is a mapping of known keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def variants(annotation: Any) -> dict[str, type[Section]]:
    """``name`` → class, for a union of sections that ``name`` tells apart (the methods); empty for others."""
    found = members(annotation)
    if len(found) < 2 or not all(is_section(member) for member in found):
        return {}
    return {get_args(member.model_fields["name"].annotation)[0]: member for member in found}


def type_at(path: Path, data: Any, root: type[Section] = Config) -> Typed | None:
    """The type that the schema has for ``path``, None if it has none.

    Args:
        path: keys and list indices from the root.
        data: the raw config; its ``name`` picks the variant of a union.
        root: the section that the path starts from.
    """
    current: Typed = (root, ())
    for part in path:
        step = _step(current, part, data)
        if step is None:
            return None
        current = step
        data = _child(data, part)
    return current


def _step(current: Typed, part: str | int, data: Any) -> Typed | None:
    annotation = current[0]
    choices = variants(annotation)
    if choices:
        name = data.get("name") if isinstance(data, Mapping) else None
        if part == "name":
            return Literal[tuple(choices)], ()
        options: list[Any] = [choices[name]] if isinstance(name, str) and name in choices else []
    else:
        options = [typed(member)[0] for member in members(annotation)]
    for option in options:
        arguments = get_args(option)
        if is_section(option) and part in option.model_fields:
            return field_type(option.model_fields[part])
        if get_origin(option) is dict and isinstance(part, str):
            return typed(arguments[1])
        if get_origin(option) is list and isinstance(part, int):
            return typed(arguments[0])
        if get_origin(option) is tuple and isinstance(part, int) and part < len(arguments):
            return typed(arguments[part])
    return None


def _child(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def known_keys(path: Path, data: Any) -> tuple[list[str], str]:
    """Keys that the schema knows at ``path``, and what they belong to when that depends on ``name`` (or "")."""
    at = type_at(path, data)
    if at is None:
        return [], ""
    value: Any = data
    for part in path:
        value = _child(value, part)
    choices = variants(at[0])
    if choices:
        name = value.get("name") if isinstance(value, Mapping) else None
        chosen = choices.get(name) if isinstance(name, str) else None
        return (list(chosen.model_fields), f"{path[-1]} `{name}`") if chosen else ([], "")
    for member in members(at[0]):
        if is_section(member):
            return list(member.model_fields), ""
    return [], ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` most likely means, or None."""
    plain = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:100].lower().replace("-", "_"), list(plain), n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def homes(key: str) -> list[str]:
    """Sections that have a key of this name."""
    return [
        name
        for name, field in Config.model_fields.items()
        if any(key in member.model_fields for member in members(field.annotation) if is_section(member))
    ]


def describe(annotation: Any, metadata: Iterable[Any] = (), *, plural: bool = False) -> str:
    """A type in words: "a number > 0", "`sgd` or `adam`", "a list of text"."""
    annotation, metadata = typed(annotation, metadata)
    optional = types.NoneType in get_args(annotation)
    options = members(annotation)
    if variants(annotation):
        return "a mapping with `name`"
    words = " or ".join(_describe_one(option, metadata, plural) for option in options)
    return f"{words} or null" if optional else words


def _describe_one(annotation: Any, metadata: Iterable[Any], plural: bool) -> str:
    annotation, metadata = typed(annotation, metadata)
    kind: Any = annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_section(annotation):
        return "mappings" if plural else "a mapping of keys"
    if origin is Literal:
        return _alternatives([f"`{value}`" for value in arguments])
    if origin is list:
        at_least = any(isinstance(item, annotated_types.MinLen) for item in metadata)
        return f"a list{' (not empty)' if at_least else ''} of {describe(arguments[0], plural=True)}"
    if origin is tuple:
        return f"a list of {len(arguments)} {describe(arguments[0], plural=True)}"
    if origin is dict:
        return f"a mapping of {describe(arguments[0], plural=True)} to {describe(arguments[1], plural=True)}"
    if kind is Any:
        return "values" if plural else "a value"
    if kind is bool:
        return "`true` or `false`"
    if kind is str:
        regex = any(isinstance(item, AfterValidator) and item.func is check_regex for item in metadata)
        return ("regexes" if plural else "a regex") if regex else "text"
    number = "whole number" if kind is int else "number"
    return (number + "s" if plural else f"a {number}") + _range(metadata)


def _range(metadata: Iterable[Any]) -> str:
    bounds = {type(item): item for item in metadata}
    words = []
    for kind, sign, attribute in (
        (annotated_types.Ge, "≥", "ge"),
        (annotated_types.Gt, ">", "gt"),
        (annotated_types.Le, "≤", "le"),
        (annotated_types.Lt, "<", "lt"),
    ):
        if kind in bounds:
            words.append(f"{sign} {getattr(bounds[kind], attribute)}")
    return f" {' and '.join(words)}" if words else ""


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
