"""VQA accuracy, and the normalisation of answers that comes before it.

Source: Antol et al. 2015, arXiv 1505.00468, and VQA v2's own evaluation (github.com/GT-Vision-Lab/VQA, ``vqaEval.py``), as
it is since March 2021 (commit a013f00): where annotators differ, their answers and the model's are normalised (lower
case, no articles, no punctuation, digits for number words, apostrophes put back); where all of them say the same, the
texts are compared as they are. Until then it normalised the model's answer always, and of the annotators' (where they
differ) nothing but the punctuation: older figures, and tools that copied it, give less for "two" or "the bus".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

FULL_MARK_ANSWERS = 3  # of the other annotators
MIN_ANNOTATORS = FULL_MARK_ANSWERS + 1  # fewer could not give a full mark

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Words whose apostrophe is put back if it is missing; those that are words without it (well, were, its, hell) are not here.
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
""".split()
# Each with one of its apostrophes left out; and the one that the official table has the other way round.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHE
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 16)
def normalise_answer(text: str) -> str:
    """The form in which answers are compared.

    A punctuation mark vanishes where it touches a space (or the answer has a comma between digits), and is a space between
    letters; a period vanishes unless a digit follows.
    """
    text = _plain(text)
    number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if touches_space or number else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How right an answer is, in [0, 1].

    Of N annotators: the mean over the N ways to leave one out of min(answers like the prediction among the others / 3, 1);
    normalised, unless all N are the same text. Of one answer, or of fewer than four (too few for a full mark): 1 if the
    prediction is one of them, normalised, else 0.

    Args:
        prediction: the model's text.
        answers: the annotators' texts, one or more.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("no answers to compare with; expected one or more")
    unanimous = len({_plain(answer) for answer in answers}) == 1
    compared = _plain if unanimous and len(answers) >= MIN_ANNOTATORS else normalise_answer
    given = compared(prediction)
    same = [compared(answer) == given for answer in answers]
    if len(answers) < MIN_ANNOTATORS:
        return float(any(same))
    marks = sum(same)
    return sum(min((marks - left_out) / FULL_MARK_ANSWERS, 1.0) for left_out in same) / len(same)
