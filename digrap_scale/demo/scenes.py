"""Pictogram-VQA's scenes and questions: what is drawn where, what can be asked about it, and the right answers.

A scene is a 2 × 2 page; each cell holds one pictogram or nothing. Everything is drawn from a ``random.Random`` that is
handed in, so equal seeds give equal scenes.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

CELLS = ("top left", "top right", "bottom left", "bottom right")
TILE = 64  # pixels of a pictogram; a page is two of them wide and high
SMALLEST = 44  # pixels of the smallest pictogram on a page

# Class of the pictograms → the noun that questions and answers use.
NOUNS = {
    "mammal": "mammal",
    "bird": "bird",
    "sea animal": "sea animal",
    "insect": "insect",
    "fruit": "fruit",
    "vegetable": "vegetable",
    "plant": "plant",
    "food": "food",
    "land vehicle": "land vehicle",
    "air or water vehicle": "craft",
    "building": "building",
    "clothing": "garment",
    "tool": "tool",
    "musical instrument": "musical instrument",
    "sport": "sport item",
    "sky or weather": "weather sign",
}

# Question type → wordings. "standard" are asked in fine-tuning and in the ID set; "varied" in pre-training only;
# "reworded" nowhere but in the sets that shift the question. Every word of "reworded" is in one of the others, but for *shown*.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "standard": {
        "what": ("what is in the {cell}?",),
        "where": ("where is the {noun}?",),
        "how many": ("how many {nouns} are there?",),
        "yes/no": ("is there {a_noun}?",),
        "yes/no cell": ("is there {a_noun} in the {cell}?",),
        "category": ("what kind of thing is in the {cell}?",),
    },
    "varied": {
        "what": (
            "what does the {cell} show?",
            "name the thing that the {cell} shows.",
            "which thing can you see {cell}?",
        ),
        "where": (
            "in which place is the {noun}?",
            "name the place of the {noun}.",
            "where can you see {a_noun}?",
        ),
        "how many": (
            "what is the number of {nouns}?",
            "count the {nouns} in the picture.",
            "how many {nouns} can you see?",
        ),
        "yes/no": (
            "does the picture show {a_noun}?",
            "can you see {a_noun}?",
            "is {a_noun} in the picture?",
        ),
        "yes/no cell": (
            "does the {cell} show {a_noun}?",
            "is the thing in the {cell} {a_noun}?",
            "can you see {a_noun} {cell}?",
        ),
        "category": (
            "which kind of thing does the {cell} show?",
            "name the kind of the thing in the {cell}.",
            "of what kind is the thing {cell}?",
        ),
    },
    "reworded": {
        "what": ("what can you see in the {cell}?", "name what is shown {cell}."),
        "where": ("which place shows the {noun}?", "in what place can you see the {noun}?"),
        "how many": (
            "count how many {nouns} the picture shows.",
            "what number of {nouns} is there in the picture?",
        ),
        "yes/no": ("is there {a_noun} that you can see?", "is {a_noun} shown?"),
        "yes/no cell": ("is {a_noun} shown in the {cell}?", "does the place {cell} show {a_noun}?"),
        "category": ("what kind of thing can you see in the {cell}?", "name the kind of thing shown {cell}."),
    },
}
# Pre-training's captions tell all four cells: their names, or their kinds.
CAPTIONS = {"names": "describe the picture.", "kinds": "what kind of thing does each place show?"}
QUESTION_TYPES = ("what", "where", "how many", "yes/no", "category")
COUNTS = ("0", "1", "2", "3", "4")
THINGS = "thing"  # the noun that counts every pictogram
THINGS_SHARE = 0.2  # of the questions how many there are, but for those answered "0": no page is empty

# concept → class
Kinds = Mapping[str, str]
# four concepts, None where the cell is empty
Scene = tuple[str | None, str | None, str | None, str | None]


@dataclass(frozen=True)
class Question:
    """A question without its wording.

    Attributes:
        type: one of ``QUESTION_TYPES``.
        form: the key of ``WORDINGS`` (a type, or "yes/no cell").
        noun: what is asked for, or "".
        cell: where is asked, or "".
        answer: the only right answer.
    """

    type: str
    form: str
    noun: str
    cell: str
    answer: str


def draw_scene(rng: random.Random, concepts: Mapping[str, Sequence[str]]) -> Scene:
    """One to four pictograms of one to four classes; no concept twice.

    Args:
        rng: the source of chance.
        concepts: class → its concepts, at least four classes with four each, or fewer pictograms come out.
    """
    count = rng.randint(1, len(CELLS))
    classes = rng.sample(sorted(concepts), min(rng.randint(1, count), len(concepts)))
    chosen = list(classes) + [rng.choice(classes) for _ in range(count - len(classes))]
    drawn: list[str] = []
    for name in chosen:
        left = [concept for concept in concepts[name] if concept not in drawn]
        if left:
            drawn.append(rng.choice(left))
    page: list[str | None] = [*drawn, *[None] * (len(CELLS) - len(drawn))]
    rng.shuffle(page)
    return (page[0], page[1], page[2], page[3])


def kinds_of(concepts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Concept → class, of ``concepts``: class → its concepts."""
    return {concept: name for name, members in concepts.items() for concept in members}


def questions(scene: Scene, kinds: Kinds, question_type: str) -> list[Question]:
    """Every question of one type that has one right answer in ``scene``.

    Args:
        scene: the page.
        kinds: concept → class.
        question_type: one of ``QUESTION_TYPES``.
    """
    nouns = [NOUNS[kinds[concept]] if concept is not None else None for concept in scene]
    filled = [
        (cell, concept, noun) for cell, concept, noun in zip(CELLS, scene, nouns, strict=True) if concept and noun
    ]
    if question_type == "what":
        return [Question("what", "what", "", cell, words(concept)) for cell, concept, _ in filled]
    if question_type == "category":
        return [Question("category", "category", "", cell, noun) for cell, _, noun in filled]
    if question_type == "where":
        return [Question("where", "where", noun, cell, cell) for cell, _, noun in filled if nouns.count(noun) == 1]
    if question_type == "how many":
        counts = {noun: nouns.count(noun) for noun in NOUNS.values()} | {THINGS: len(filled)}
        return [Question("how many", "how many", noun, "", COUNTS[count]) for noun, count in counts.items()]
    present = [Question("yes/no", "yes/no", noun, "", _yes(noun in nouns)) for noun in NOUNS.values()]
    placed = [
        Question("yes/no", "yes/no cell", noun, cell, _yes(noun == there))
        for cell, _, there in filled
        for noun in NOUNS.values()
        if noun in nouns
    ]
    return present + placed


def words(concept: str) -> str:
    """The name as it is spoken: *fire-engine* → "fire engine"."""
    return concept.replace("-", " ")


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def word(question: Question, wording: str) -> str:
    """The question's text in one of its wordings (``WORDINGS[…][question.form]``)."""
    noun = question.noun
    article = "an" if noun[:1] in tuple("aeiou") else "a"
    # The slot for the cell differs from ``cell`` of "where", whose wordings have none.
    return wording.format(cell=question.cell, noun=noun, nouns=f"{noun}s", a_noun=f"{article} {noun}")


def describe(scene: Scene, kinds: Kinds, what: str) -> str:
    """The four cells in reading order, as pre-training's captions tell them.

    Args:
        scene: the page.
        kinds: concept → class.
        what: a key of ``CAPTIONS``.
    """
    tell = words if what == "names" else lambda concept: NOUNS[kinds[concept]]
    return ", ".join("nothing" if concept is None else tell(concept) for concept in scene)


def answer_set(question_type: str) -> tuple[str, ...]:
    """The answers whose frequencies a prior sets; for "what", the nouns of the things asked for."""
    return {
        "where": CELLS,
        "how many": COUNTS,
        "yes/no": ("yes", "no"),
    }.get(question_type, tuple(NOUNS.values()))


# Relative frequencies of the answers, in the order of ``answer_set``; classes alternate between frequent and rare.
SKEW: dict[str, tuple[float, ...]] = {
    "where": (4, 3, 2, 1),
    "how many": (2, 6, 4, 2, 1),
    "yes/no": (3, 1),
    "what": (4, 1) * 8,
    "category": (4, 1) * 8,
}


def target(rng: random.Random, question_type: str, prior: str) -> str:
    """Draw the answer to ask for.

    Args:
        rng: the source of chance.
        question_type: one of ``QUESTION_TYPES``.
        prior: "balanced", "skewed" (``SKEW``) or "reversed" (``SKEW`` backwards).
    """
    answers = answer_set(question_type)
    if prior == "balanced":
        return rng.choice(answers)
    weights = SKEW[question_type] if prior == "skewed" else SKEW[question_type][::-1]
    return rng.choices(answers, weights)[0]


def draw_question(
    rng: random.Random, question_type: str, prior: str, concepts: Mapping[str, Sequence[str]]
) -> tuple[Scene, Question]:
    """A scene and a question about it whose answer follows ``prior``: scenes are drawn until one fits.

    The form, and whether things of a class or all of them are counted, are drawn first, so that they do not tell the answer.

    Args:
        rng: the source of chance.
        question_type: one of ``QUESTION_TYPES``.
        prior: see ``target``.
        concepts: class → its concepts.
    """
    kinds = kinds_of(concepts)
    wanted = target(rng, question_type, prior)
    by_noun = {NOUNS[name] for name in concepts}
    while question_type in ("what", "category") and wanted not in by_noun:  # a style may lack a class
        wanted = target(rng, question_type, prior)
    form = rng.choice(("yes/no", "yes/no cell")) if question_type == "yes/no" else question_type
    of_all = question_type == "how many" and wanted != COUNTS[0] and rng.random() < THINGS_SHARE
    for _ in range(10_000):
        scene = draw_scene(rng, concepts)
        fitting = []
        for question in questions(scene, kinds, question_type):
            asked = question.answer
            if question_type == "what":
                concept = scene[CELLS.index(question.cell)]
                assert concept is not None
                asked = NOUNS[kinds[concept]]
            if asked == wanted and question.form == form and (question.noun == THINGS) == of_all:
                fitting.append(question)
        if fitting:
            return scene, rng.choice(fitting)
    raise ValueError(f"no scene of {len(kinds)} concepts has a {question_type!r} question with the answer {wanted!r}")


def compose(rng: random.Random, scene: Scene, tile: Callable[[str], Image.Image]) -> Image.Image:
    """Draw the page: RGB, ``2 · TILE`` pixels wide and high; each pictogram somewhat smaller than its cell, anywhere in it.

    Args:
        rng: the source of chance.
        scene: the page.
        tile: concept → its pictogram, RGB on white.
    """
    page = Image.new("RGB", (2 * TILE, 2 * TILE), "white")
    for index, concept in enumerate(scene):
        if concept is None:
            continue
        side = rng.randint(SMALLEST, TILE)
        left, top = rng.randint(0, TILE - side), rng.randint(0, TILE - side)
        drawn = tile(concept).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(drawn, (index % 2 * TILE + left, index // 2 * TILE + top))
    return page


def encode(page: Image.Image) -> bytes:
    """WebP bytes of a page, quick to write."""
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=85, method=1)
    return buffer.getvalue()


def make_sample(
    seed: str,
    style: str,
    question_type: str,
    prior: str,
    wordings: str,
    concepts: Mapping[str, Sequence[str]],
    tile: Callable[[str], Image.Image],
) -> dict[str, object]:
    """One sample as ``write_shards`` takes it, drawn from ``seed`` alone.

    Args:
        seed: everything random follows from it; it must differ between samples.
        style: the drawings' style, for the record.
        question_type: one of ``QUESTION_TYPES``.
        prior: see ``target``.
        wordings: a key of ``WORDINGS``.
        concepts: class → its concepts.
        tile: concept → its pictogram.
    """  # fmt: skip
    rng = random.Random(seed)
    scene, question = draw_question(rng, question_type, prior, concepts)
    kinds = kinds_of(concepts)
    meta = {
        "question": word(question, rng.choice(WORDINGS[wordings][question.form])),
        "answers": [question.answer],
        "question_type": question.type,
        "style": style,
        "concepts": list(scene),
        "classes": [None if concept is None else kinds[concept] for concept in scene],
    }
    return {"image": encode(compose(rng, scene, tile)), "extension": "webp", "meta": meta}
