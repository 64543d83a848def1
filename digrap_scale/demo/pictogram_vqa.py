"""Pictogram-VQA's sets: what each one shifts, and how its shards are written from pictogram tiles.

The pictograms that ship give the demo's sets; ``tools/make_pictogram_vqa.py`` writes the whole from the packages, with
the same code.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from digrap_scale.data.reading import decode_image, samples_of
from digrap_scale.data.shards import Manifest, ShardSet, write_shards
from digrap_scale.data.splitting import Span
from digrap_scale.demo import scenes

SEED = 0
SOURCE = "fluent-emoji-high-contrast"  # the style that is fine-tuned on: black line drawings
PARTS = ("train", "test")
SAMPLES_PER_SHARD = 1000

# style → part → concept → tile
Tiles = Mapping[str, Mapping[str, Mapping[str, Image.Image]]]


@dataclass(frozen=True)
class SetSpec:
    """One set of Pictogram-VQA.

    Attributes:
        name: the shards' prefix, and the row of the table.
        styles: drawn from in turn, a page in one style.
        shift: "train", "id", "near" or "far".
        modality: what it shifts.
        prior: of the answers; see ``scenes.target``.
        wordings: of the questions; a key of ``scenes.WORDINGS``.
        part: "train" for pages of training concepts. In a "test" set, only "what" is asked about these (a name that
            was never seen cannot be given); everything else about held-out concepts.
        draws: the name that chance is seeded with; sets with equal ``draws`` and different style, wordings or prior ask
            about the same places.
    """

    name: str
    styles: tuple[str, ...] = (SOURCE,)
    shift: str = "near"
    modality: str = "none"
    prior: str = "skewed"
    wordings: str = "standard"
    part: str = "test"
    draws: str = "test"


COLOUR_STYLES = ("noto", "twemoji", "fluent-emoji-flat")
OLDER_STYLES = ("emojione", "noto-v1")
TRAIN = SetSpec("train", shift="train", part="train", draws="train")
VALIDATION = SetSpec("validation", shift="id", draws="validation")
TESTS = (
    SetSpec("id", shift="id"),
    SetSpec("colour styles", COLOUR_STYLES, modality="vision"),
    SetSpec("older styles", OLDER_STYLES, modality="vision"),
    SetSpec("other line style", ("emojione-monotone",), modality="vision"),
    SetSpec("reworded", modality="question", wordings="reworded"),
    SetSpec("answer prior", modality="answer", prior="reversed"),
    SetSpec("colour reworded", COLOUR_STYLES, modality="multimodal", wordings="reworded"),
)
# Candidates; those that the base model answers wrongly are the set.
ADVERSARIAL = SetSpec(
    "adversarial", (SOURCE, *COLOUR_STYLES), modality="adversarial", prior="balanced", draws="candidates"
)


def prefix(spec: SetSpec) -> str:
    """The name of the set's shard files."""
    return spec.name.replace(" ", "-")


def samples(spec: SetSpec, tiles: Tiles, label: Mapping[str, str], indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The set's samples of these numbers; each follows from the set's ``draws`` and its number alone.

    Args:
        spec: the set.
        tiles: of every style of the set.
        label: concept → class.
        indices: which samples.
    """
    concepts = {(style, part): by_class(tiles[style].get(part, {}), label) for style in spec.styles for part in PARTS}
    for index in indices:
        style = spec.styles[index % len(spec.styles)]
        types = [kind for kind in scenes.QUESTION_TYPES if kind != "what" or concepts[style, "train"]]
        question_type = types[index // len(spec.styles) % len(types)]
        part = "train" if question_type == "what" else spec.part
        sample = scenes.make_sample(
            f"{SEED}/{spec.draws}/{index}",
            style,
            question_type,
            spec.prior,
            spec.wordings,
            concepts[style, part],
            tiles[style][part].__getitem__,
        )
        sample["key"] = f"{prefix(spec)}-{index:06d}"
        yield sample


def by_class(drawn: Iterable[str], label: Mapping[str, str]) -> dict[str, list[str]]:
    """Class → its concepts, of those ``drawn``, sorted."""
    table: dict[str, list[str]] = {}
    for concept in sorted(drawn):
        table.setdefault(label[concept], []).append(concept)
    return table


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample to be written, as it is read back."""
    image = decode_image(sample["image"], sample["key"])
    return {"key": sample["key"], "shard": "", "image": image, "meta": sample["meta"]}


def write_set(spec: SetSpec, tiles: Tiles, label: Mapping[str, str], folder: Path, indices: Sequence[int]) -> Manifest:
    """Write the set's shards and manifest into ``folder``.

    Raises:
        SaveError: the disk refuses.
    """
    return write_shards(
        samples(spec, tiles, label, indices), folder, prefix=prefix(spec), samples_per_shard=SAMPLES_PER_SHARD
    )


def read_tiles(folder: Path) -> tuple[dict[str, dict[str, dict[str, Image.Image]]], dict[str, str]]:
    """Tiles (style → part → concept → image) and labels (concept → class) of the pictogram shards in ``folder``.

    Raises:
        ConfigError: a shard cannot be read.
    """
    tiles: dict[str, dict[str, dict[str, Image.Image]]] = {}
    label: dict[str, str] = {}
    for manifest in sorted(folder.glob("*.manifest.json")):
        name = manifest.name.removesuffix(".manifest.json")
        style, _, part = name.rpartition("-")
        for sample in read_set(folder, name):
            meta = sample["meta"]
            tiles.setdefault(style, {}).setdefault(part, {})[meta["concept"]] = sample["image"]
            label[meta["concept"]] = meta["label"]
    return tiles, label


def prior_answers(folder: Path) -> dict[str, str]:
    """Question type → the most frequent answer of the training set: what one can say without looking.

    Raises:
        ConfigError: the training shards cannot be read.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in read_set(folder, prefix(TRAIN)):
        counts[sample["meta"]["question_type"]][sample["meta"]["answers"][0]] += 1
    return {kind: max(sorted(table), key=table.__getitem__) for kind, table in counts.items()}


def read_set(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The decoded samples of the shards ``NAME-*.tar``, in their order.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    shards = ShardSet.open([str(folder / f"{name}-*.tar")])
    yield from samples_of([Span(number, 0, count) for number, count in enumerate(shards.counts)], shards.paths)


def read_indices(path: Path) -> list[int]:
    """The adversarial set's numbers, as ``tools/make_pictogram_vqa.py`` keeps them."""
    return [int(index) for index in json.loads(path.read_text(encoding="utf-8"))["indices"]]
