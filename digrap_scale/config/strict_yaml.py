"""A small, strict YAML: PyYAML's SafeLoader without tags, anchors, aliases and YAML 1.1's surprising scalars.

Scalars follow YAML 1.2's core schema, decimal numbers only: ``1e-4`` is a number; ``yes``, ``1:30``, ``010``, ``0x1F``,
``1_000`` and ``2024-01-01`` are text, which the schema refuses where a number is due. Nothing is constructed by tag.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from .rules import Path

MAX_CHARACTERS = 256 * 1024  # PyYAML reads ~100 kB a second; a config has a few kB
MAX_DEPTH = 20  # the schema has five levels
MAX_INTEGER = 2**63 - 1

_NULL, _BOOL, _INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_RESOLVERS = (
    (_NULL, r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    (_INT, r"[-+]?(?:0|[1-9][0-9]*)\Z", list("-+0123456789")),
    (
        _FLOAT,
        r"(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
)


_QUOTE = "; put text that begins with `*`, `&` or `!` in quotes"


class YamlError(Exception):
    """The text is not YAML that this reader takes. ``line`` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass
class Document:
    """What a text holds.

    Attributes:
        data: plain dicts, lists, str, int, float, bool, None.
        lines: path → line of its key (or list item), counted from 1.
        texts: path → a scalar as it was written.
        problems: (line, path, message) of things that can be listed beside the schema's complaints.
        refused: paths whose value in ``data`` is only a stand-in, because ``problems`` has the real one.
    """

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[int, Path, str]] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; refuses what a config has no use for before anything is expanded."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        refused = None
        if isinstance(event, yaml.AliasEvent):
            refused = f"an alias `*{event.anchor}`"
        elif event.anchor is not None:
            refused = f"an anchor `&{event.anchor}`"
        elif event.tag is not None:
            refused = f"a tag `{event.tag.replace('tag:yaml.org,2002:', '!!')}`"
        if refused:
            raise YamlError(line, f"expected plain YAML, found {refused}{_QUOTE}")
        if self.depth >= MAX_DEPTH:
            raise YamlError(line, f"expected at most {MAX_DEPTH} nested levels, found more")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, _regex, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_regex), _first)


class _Dumper(yaml.SafeDumper):
    """Writes what the reader above reads back: text that either YAML 1.1 or 1.2 would take for a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _regex, _first in _RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, re.compile(_regex), _first)


def dump(data: Any) -> str:
    """``data`` (dicts, lists, scalars) as YAML that ``read`` reads back, keys in the given order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000))


def read(text: str) -> Document:
    """Read one YAML document.

    Raises:
        YamlError: not YAML, several documents, a tag, an anchor, an alias, nested too deeply, too long,
            or characters that YAML does not allow.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(1, f"expected at most {MAX_CHARACTERS} characters, found {len(text)}")
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd:
        raise YamlError(
            text.count("\n", 0, odd.start()) + 1, f"expected printable text, found the character {ord(odd[0]):#06x}"
        )
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        hint = _QUOTE if re.search(r"\b(alias|anchor|tag)\b", reason) else ""
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {reason}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError, IndexError) as error:
        # PyYAML lets some of Python's own errors through, e.g. for the escape "\UFFFFFFFF".
        raise YamlError(loader.get_mark().line + 1, f"not YAML: {error}") from None
    finally:
        loader.dispose()
    document = Document()
    if root is not None:
        document.data = _value(root, (), document)
    return document


def _value(node: Any, path: Path, document: Document) -> Any:
    """The plain value of a node; notes lines, texts and problems in ``document``. Depth is bounded by the loader."""
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), document) for index, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TEXT:
            found = f"`{key_node.value}`" if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
            document.problems.append((key_line, path, f"expected a key that is text, found {found}"))
            continue
        key = key_node.value
        child = (*path, key)
        if _odd_text(key, key_line, path, document):
            continue
        if key in mapping:
            first = document.lines[child]
            document.problems.append((key_line, child, f"expected it once, found it twice (first on line {first})"))
            continue
        document.lines[child] = key_line
        mapping[key] = _value(value_node, child, document)
    return mapping


def _scalar(node: Any, path: Path, document: Document) -> Any:
    text: str = node.value
    document.texts[path] = text
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        # Long digits first: Python refuses to convert thousands of them.
        if len(text) > 20 or abs(int(text)) > MAX_INTEGER:
            problem = f"expected a whole number of at most 64 bits, found {text[:20]}… ({len(text)} characters)"
            document.problems.append((node.start_mark.line + 1, path, problem))
            document.refused.add(path)
            return 0
        return int(text)
    if node.tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if _odd_text(text, node.start_mark.line + 1, path, document):
        document.refused.add(path)
    return text


def _odd_text(text: str, line: int, path: Path, document: Document) -> bool:
    """Note a character that an escape can spell, but no file name or file can hold: NUL and lone surrogates."""
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            document.problems.append((line, path, f"expected text, found the character {ord(character):#06x} in it"))
            return True
    return False
