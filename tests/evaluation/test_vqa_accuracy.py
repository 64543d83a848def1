"""VQA accuracy from its definition, counted by hand."""

from __future__ import annotations

import pytest

from digrap_scale.evaluation.vqa_accuracy import normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  the  Red\tfire\nengine ", "red fire engine"),
        ("a cat and an owl", "cat and owl"),
        ("An apple.", "apple"),
        ("theatre", "theatre"),
        # number words, as whole words
        ("Two", "2"),
        ("none", "0"),
        ("zero", "0"),
        ("ten dogs", "10 dogs"),
        ("someone", "someone"),
        ("eleven", "eleven"),
        # punctuation: gone beside a space, a space between letters
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("(left) side", "left side"),
        ("1,000", "1000"),
        ("1,000 (one)", "1000 1"),
        # periods: kept before a digit
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("p.m.", "pm"),
        (".5", ".5"),
        # apostrophes are put back
        ("dont know", "don't know"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("2 oclock", "2 o'clock"),
        ("yall", "y'all"),
        ("twas", "'twas"),
        ("ow's'at", "'ow's'at"),
        ("well", "well"),
        ("its", "its"),
        ("don't", "don't"),
        ("somebody'd", "somebodyd"),  # so it stands in the official table
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    # k of ten annotators say it: leaving one of the k out, k − 1 of the others do, else k.
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        (3, (3 * (2 / 3) + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_ten_annotators(times: int, expected: float) -> None:
    answers = ["Red."] * times + [f"other {i}" for i in range(10 - times)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(expected, abs=1e-12)
    # The familiar form of it: min(3 k / 10, 1).
    assert expected == pytest.approx(min(0.3 * times, 1.0), abs=1e-12)


# prediction, ten annotators' answers, score: each worked out by VQA v2's own vqaEval.py (a013f00). Where it says so, the
# script gave something else until March 2021: only the model's answer lost its articles and number words.
OFFICIAL = [
    ("two", ["two"] * 9 + ["2"], 1.0),  # 0.3
    ("2", ["two"] * 9 + ["2"], 1.0),  # 0.3
    ("bus", ["the bus"] * 9 + ["car"], 1.0),  # 0
    ("the bus", ["the bus"] * 9 + ["car"], 1.0),  # 0
    ("yes", ["Yes."] * 9 + ["no"], 1.0),  # 0
    ("black white", ["black/white"] * 2 + ["grey"] * 8, 0.6),
    ("dont know", ["don't know"] * 3 + ["no"] * 7, 0.9),
    # All say the same: compared as they are.
    ("two", ["two"] * 10, 1.0),  # 0
    ("2", ["two"] * 10, 0.0),
    ("the bus", ["the bus"] * 10, 1.0),  # 0
    ("Yes", ["yes"] * 10, 0.0),  # 1
    ("yes.", ["yes"] * 10, 0.0),  # 1
    ("yes\n", [" yes"] * 5 + ["yes\t"] * 5, 1.0),  # 0
    ("black/white", ["black/white"] * 10, 1.0),  # 0
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), OFFICIAL)
def test_as_the_official_script(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Two", ["2"], 1.0),
        ("Two.", ["the 2", "the 2"], 1.0),  # fewer than four: normalised, whether they agree or not
        ("3", ["2"], 0.0),
        ("a red  car", ["the red car"], 1.0),
        ("", ["2"], 0.0),
        ("two", ["2", "3"], 1.0),  # fewer than four: one of them is enough
        ("2", ["two", "two", "two", "4"], (3 * (2 / 3) + 1) / 4),
    ],
)
def test_few_answers(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_no_answers() -> None:
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("yes", [])
