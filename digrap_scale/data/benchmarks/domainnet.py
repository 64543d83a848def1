"""DomainNet (Peng et al. 2019, arXiv 1812.01754): 345 classes drawn in six styles.

Files (ai.bu.edu/M3SDA, cleaned version): a list ``real_train.txt`` or ``real_test.txt`` for each domain, a line an image:
``real/aircraft_carrier/real_001_000001.jpg 0`` (path below the folder of images, class number); ``real.zip`` … unpack
to ``real/``. A class's name is its folder's, with spaces for underscores (it may have to be an answer).
``painting_train.txt`` lacks class 327 (t-shirt), so classes are taken from a list that has all of them, such as real's.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources, items
from digrap_scale.errors import ConfigError

PROMPT = "a photo of a {}."  # CLIP's own, Radford et al. 2021


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of one list: the class's name as ``label``."""
    assert sources.annotations is not None

    def make(name: str, number: int, where: str) -> Item:
        path = PurePosixPath(name)
        meta = {"label": _class_name(path), "domain": path.parts[0], "class_index": number}
        return Item(path.stem.replace(".", "_"), (name,), meta, where)

    yield from items(_lines(sources.annotations), make)


def class_prompts(path: Path) -> dict[str, str]:
    """Class name → prompt for ``data.classes``, in the order of the class numbers.

    Raises:
        ConfigError: a class number with two names, or numbers from 0 on with a gap.
    """
    names: dict[int, str] = {}
    for found in _lines(path):
        if isinstance(found, Problem):
            raise ConfigError(found.message)
        name, number, where = found
        label = _class_name(PurePosixPath(name))
        if names.setdefault(number, label) != label:
            raise ConfigError(f"{where}: class {number} is {label!r} here and {names[number]!r} before")
    missing = sorted(set(range(max(names, default=-1) + 1)) - set(names))
    if missing or not names:
        raise ConfigError(f"{path}: class {missing[0] if names else 0} has no image; take a list that has all classes")
    if len(set(names.values())) < len(names):
        raise ConfigError(f"{path}: two class numbers have one name; expected a folder for each class")
    return {names[number]: PROMPT.format(names[number]) for number in sorted(names)}


def _class_name(path: PurePosixPath) -> str:
    return path.parts[-2].replace("_", " ")


def _lines(path: Path) -> Iterator[tuple[str, int, str] | Problem]:
    """(image, class number, file and line for messages) of each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if len(PurePosixPath(name).parts) != 3 or not (label.isascii() and label.isdigit()):
            expected = "expected `domain/class/image number`"
            yield Problem("bad record", f"{path}:{number}: {expected}, found {line.strip()[:80]!r}")
        else:
            yield name, int(label), f"{path}:{number}"


BENCHMARK = Benchmark(("annotations",), read)
