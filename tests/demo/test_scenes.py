"""Scenes and questions: the right answers by another road, wordings, priors, determinism."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from PIL import Image

from digrap_scale.demo import scenes

# Two letters a class and eight concepts each: the class can be read off the name, by the test's own rule.
CLASSES = ("mammal", "bird", "insect", "food", "air or water vehicle", "sky or weather")
CONCEPTS = {name: [f"{name[:2]}-thing-{number}" for number in range(8)] for name in CLASSES}
KINDS = {concept: name for name, members in CONCEPTS.items() for concept in members}
SAY = {"ma": "mammal", "bi": "bird", "in": "insect", "fo": "food", "ai": "craft", "sk": "weather sign"}
PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


def answer_by_reading(text: str, scene: scenes.Scene) -> str:
    """The answer to a standard wording, worked out from the text and the page alone."""
    said = [None if concept is None else SAY[concept[:2]] for concept in scene]
    if match := re.fullmatch(r"what is in the (\w+ \w+)\?", text):
        return str(scene[PLACES[match[1]]]).replace("-", " ")
    if match := re.fullmatch(r"what kind of thing is in the (\w+ \w+)\?", text):
        return str(said[PLACES[match[1]]])
    if match := re.fullmatch(r"where is the (.+)\?", text):
        (place,) = [place for place, index in PLACES.items() if said[index] == match[1]]
        return place
    if match := re.fullmatch(r"how many (.+)s are there\?", text):
        return str(sum(word is not None for word in said) if match[1] == "thing" else said.count(match[1]))
    if match := re.fullmatch(r"is there an? (.+) in the (\w+ \w+)\?", text):
        return "yes" if said[PLACES[match[2]]] == match[1] else "no"
    match = re.fullmatch(r"is there an? (.+)\?", text)
    assert match, text
    return "yes" if match[1] in said else "no"


@pytest.mark.parametrize("question_type", scenes.QUESTION_TYPES)
def test_answers_are_right(question_type: str) -> None:
    asked = 0
    for number in range(100):
        scene = scenes.draw_scene(random.Random(number), CONCEPTS)
        for question in scenes.questions(scene, KINDS, question_type):
            for wording in scenes.WORDINGS["standard"][question.form]:
                text = scenes.word(question, wording)
                assert question.answer == answer_by_reading(text, scene), (text, scene)
                asked += 1
    assert asked > 100


def test_captions_tell_every_cell() -> None:
    scene = ("ai-thing-1", None, "sk-thing-2", "fo-thing-3")
    assert scenes.describe(scene, KINDS, "names") == "ai thing 1, nothing, sk thing 2, fo thing 3"
    assert scenes.describe(scene, KINDS, "kinds") == "craft, nothing, weather sign, food"


def test_scenes_repeat_classes_but_no_concept() -> None:
    drawn = [scenes.draw_scene(random.Random(number), CONCEPTS) for number in range(300)]
    filled = [[concept for concept in scene if concept is not None] for scene in drawn]
    assert {len(concepts) for concepts in filled} == {1, 2, 3, 4}
    assert all(len(set(concepts)) == len(concepts) for concepts in filled)
    assert any(len({KINDS[concept] for concept in concepts}) == 1 for concepts in filled if len(concepts) == 4)


@pytest.mark.parametrize("question_type", ["where", "how many", "yes/no"])
def test_priors_shape_the_answers(question_type: str) -> None:
    counts = {
        prior: Counter(
            scenes.draw_question(random.Random(f"{prior}/{number}"), question_type, prior, CONCEPTS)[1].answer
            for number in range(400)
        )
        for prior in ("balanced", "skewed", "reversed")
    }
    answers, weights = scenes.answer_set(question_type), scenes.SKEW[question_type]
    for answer, weight, mirrored in zip(answers, weights, weights[::-1], strict=True):
        # Four standard deviations of a share of 400 draws.
        assert counts["skewed"][answer] / 400 == pytest.approx(weight / sum(weights), abs=0.1)
        assert counts["reversed"][answer] / 400 == pytest.approx(mirrored / sum(weights), abs=0.1)
        assert counts["balanced"][answer] / 400 == pytest.approx(1 / len(answers), abs=0.1)


@pytest.mark.parametrize("question_type", ["how many", "yes/no"])
@pytest.mark.parametrize("prior", ["balanced", "skewed"])
def test_the_question_does_not_tell_the_answer(question_type: str, prior: str) -> None:
    """Neither form nor noun: whoever only reads the question is as often right as who only knows the prior."""
    told: dict[tuple[str, bool], Counter[str]] = {}
    for number in range(600):
        _, question = scenes.draw_question(random.Random(f"{prior}/{number}"), question_type, prior, CONCEPTS)
        told.setdefault((question.form, question.noun == scenes.THINGS), Counter())[question.answer] += 1
    assert len(told) == 2
    weights = scenes.SKEW[question_type] if prior == "skewed" else (1,) * len(scenes.answer_set(question_type))
    blind = sum(max(answers.values()) for answers in told.values()) / 600
    # Three standard deviations; no page is empty, so that "how many things" is never answered "0".
    assert blind < max(weights) / sum(weights) + 0.06 + (0.05 if question_type == "how many" else 0), told


def test_an_answer_that_no_scene_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="how many"):
        for number in range(50):  # one class of one concept: never two of a kind
            scenes.draw_question(random.Random(number), "how many", "balanced", {"bird": ["bi-1"]})


def test_reworded_questions_are_new_but_their_words_are_not() -> None:
    def words(*sets: str) -> set[str]:
        return {
            word.strip("?.")
            for name in sets
            for wordings in scenes.WORDINGS[name].values()
            for wording in wordings
            for word in wording.split()
        }

    assert words("reworded") - words("standard", "varied") == {"shown"}
    known = {wording for name in ("standard", "varied") for ones in scenes.WORDINGS[name].values() for wording in ones}
    assert not known & {wording for wordings in scenes.WORDINGS["reworded"].values() for wording in wordings}
    assert {frozenset(forms) for forms in scenes.WORDINGS.values()} == {frozenset(scenes.WORDINGS["standard"])}


def test_pictograms_stand_in_their_cells() -> None:
    page = scenes.compose(
        random.Random(0),
        (None, "ma-thing-1", None, None),
        lambda _: Image.new("RGB", (scenes.TILE, scenes.TILE), "black"),
    )
    dark = {
        place: page.crop((x, y, x + scenes.TILE, y + scenes.TILE)).getextrema()[0][0] < 128
        for place, x, y in [("tl", 0, 0), ("tr", 64, 0), ("bl", 0, 64), ("br", 64, 64)]
    }
    assert dark == {"tl": False, "tr": True, "bl": False, "br": False}


def test_every_class_has_a_noun_and_a_sample_follows_from_its_seed() -> None:
    tile = Image.new("RGB", (scenes.TILE, scenes.TILE), "red")
    made = [
        scenes.make_sample(seed, "style", "where", "skewed", "reworded", CONCEPTS, lambda _: tile) for seed in "aab"
    ]
    assert made[0] == made[1] and made[0] != made[2]
    meta = made[0]["meta"]
    assert isinstance(meta, dict) and meta["question_type"] == "where" and len(meta["concepts"]) == 4
