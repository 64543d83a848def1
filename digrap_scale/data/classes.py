"""The classes file: what the labels in the shards may be, in the order of the model's outputs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from digrap_scale.errors import ConfigError


@dataclass(frozen=True)
class Classes:
    """Class names and their prompts, in the order of the class indices."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]


def load_classes(path: str | Path) -> Classes:
    """Reads a JSON object (name → prompt) or a JSON list of names (prompts are then the names).

    Raises:
        ConfigError: missing file, not JSON, not such a list or object, empty, or a name that comes twice.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise ConfigError(f"data.classes: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.classes: {path} is not JSON: {error}") from error
    if isinstance(raw, _Pairs):
        pairs = list(raw)
    elif isinstance(raw, list):
        pairs = [(name, name) for name in raw]
    else:
        pairs = []
    texts = [(name, prompt) for name, prompt in pairs if isinstance(name, str) and name and isinstance(prompt, str)]
    if not pairs or len(texts) < len(pairs):
        raise ConfigError(f"data.classes: {path}: expected an object of name → prompt or a list of names, not empty")
    repeated = [name for name, count in Counter(name for name, _ in texts).items() if count > 1]
    if repeated:
        raise ConfigError(f"data.classes: {path}: {', '.join(map(repr, repeated))} comes more than once")
    return Classes(tuple(name for name, _ in texts), tuple(prompt for _, prompt in texts))


class _Pairs(list[tuple[str, object]]):
    """A JSON object with its order and repeated keys; a list of lists is not mistaken for one."""
