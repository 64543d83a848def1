"""A suite in a file of its own: read while a config is loaded, its test sets follow those that the config lists itself.

The file is strict YAML with one key, ``suite``: a list of test sets as ``evaluation.suite`` takes them. What comes out is
a config without ``suite_file``: a run's ``config.yaml`` tells all its test sets, whatever becomes of the file.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from . import strict_yaml
from .describe import nearest
from .raw import Raw, one_line, read_text
from .strict_yaml import Document, YamlError

_KEY = "suite"
_WHERE = ("evaluation", "suite_file")


def merge_suite_file(raw: Raw) -> None:
    """Put the test sets of ``evaluation.suite_file``, if there is one, at the end of ``evaluation.suite``.

    What is wrong with the file becomes a problem of ``raw``. Values of a wrong type are left for the schema to refuse.
    """
    evaluation = raw.data.get("evaluation")
    if not isinstance(evaluation, dict):
        return
    path, own = evaluation.get("suite_file"), evaluation.get(_KEY, [])
    if not isinstance(path, str) or not path or _WHERE in raw.refused:
        return
    evaluation["suite_file"] = None
    name = one_line(path)
    try:
        document = strict_yaml.read(read_text(path, name))
        entries = _entries(document, name)
    except YamlError as error:
        raw.complain(_WHERE, f"evaluation.suite_file: {name}:{error.line}: {error.message}")
        return
    except ConfigError as error:
        raw.complain(_WHERE, f"evaluation.suite_file: {error}")
        return
    for line, where, message in document.problems:
        if len(where) < 2:  # those of a test set go with it, below
            raw.complain(_WHERE, f"evaluation.suite_file: {name}:{line}: {message}")
    if not isinstance(own, list):
        return
    evaluation[_KEY] = [*own, *entries]
    for index in range(len(entries)):
        raw.take(_part(document, index), ("evaluation", _KEY, len(own) + index), None, file=name)


def _entries(document: Document, name: str) -> list[Any]:
    """The file's test sets. Raises: ConfigError."""
    data = document.data if isinstance(document.data, dict) else {}
    for key in data:
        if key != _KEY:
            hint = f"did you mean `{_KEY}`?" if nearest(key, [_KEY]) else f"known: {_KEY}"
            raise ConfigError(f"{name}: unknown key `{key}` in a suite file; {hint}")
    entries = data.get(_KEY)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{name}: expected a suite file with the key `{_KEY}` and a list of test sets, found none")
    return entries


def _part(document: Document, index: int) -> Document:
    """One test set of the file as a document of its own."""
    head = (_KEY, index)

    def inside(path: tuple[str | int, ...]) -> bool:
        return path[:2] == head

    return Document(
        document.data[_KEY][index],
        {path[2:]: line for path, line in document.lines.items() if inside(path)},
        {path[2:]: text for path, text in document.texts.items() if inside(path)},
        [(line, path[2:], message) for line, path, message in document.problems if inside(path)],
        {path[2:] for path in document.refused if inside(path)},
    )
