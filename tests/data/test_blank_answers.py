"""In benchmarks' files an annotator sometimes said nothing: that counts in the score, and is never trained on."""

from __future__ import annotations

import pytest

from digrap_scale.data.tasks.base import texts_field
from digrap_scale.data.tasks.vqa import VqaTask
from digrap_scale.errors import ConfigError


def sample(answers: object) -> dict:
    return {"shard": "a.tar", "key": "1", "meta": {"answers": answers}, "seed": 3}


def test_blank_answers_are_kept() -> None:
    assert texts_field(sample(["", "cat", " "]), "answers", "data.answers_field") == ["", "cat", " "]


@pytest.mark.parametrize("answers", [[], ["", " "], "cat", [3], None])
def test_no_answer_at_all(answers: object) -> None:
    with pytest.raises(ConfigError, match="a.tar: sample 1: JSON field 'answers'"):
        texts_field(sample(answers), "answers", "data.answers_field")


@pytest.mark.parametrize("choice", ["most_frequent", "random"])
def test_never_trained_on(choice: str) -> None:
    task = VqaTask.__new__(VqaTask)
    task.answer_choice = choice
    assert task.target(sample([]), ["", "", "", "cat"]) == "cat"
