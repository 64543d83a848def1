"""Each family in its published chat format, with a BPE tokenizer: what is supervised reads as the answer and its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from digrap_scale.errors import ConfigError
from digrap_scale.models.families import Family
from tests.models.chat_formats import FORMATS, QUESTION, llava, published
from tests.models.tiny_vlm import MAKERS

IMAGE = Image.new("RGB", (20, 20), (200, 30, 30))
ANSWERS = ["red", "the red fire engine", "3.5", "12", "a cat, two dogs", "café 北", "Yes."]


def test_every_family_has_a_format() -> None:
    assert set(FORMATS) == set(MAKERS)


@pytest.mark.parametrize("kind", FORMATS)
def test_published_format(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form, family = FORMATS[kind], published(kind, tmp_path, monkeypatch)
    tokenizer = family.tokenizer
    assert family.prompt(QUESTION, 1) == form.prompt
    assert (family.opening, family.end) == (form.opening, form.end)
    assert family.end_ids == [tokenizer.convert_tokens_to_ids(form.end)]
    for images in ([IMAGE], [IMAGE, IMAGE], []):
        start = family.encode(QUESTION, images)
        if form.bos is not None:  # once, whether the tokenizer, the template or the processor puts it there
            assert start.tokens["input_ids"].count(tokenizer.bos_token_id) == 1
        for answer in ANSWERS:
            row = family.encode(QUESTION, images, answer)
            ids = row.tokens["input_ids"]
            supervised = family.supervised([row], len(row))[0]
            told = supervised[row.prompt_tokens :].tolist()
            assert ids == start.tokens["input_ids"] + told and (supervised[: row.prompt_tokens] == -100).all()
            assert tokenizer.decode(told) == form.opening + answer + form.end
            assert family.decode(torch.tensor([told])) == [answer]
            assert len(told) > 2 or answer in ("red", "12"), "words are to be several tokens"
            if not images:  # as the tokenizer reads the whole text
                whole = family.prompt(QUESTION, 0) + form.opening + answer + form.end
                together = tokenizer(whole, add_special_tokens=False)["input_ids"]
                assert ids[-len(together) :] == together


@pytest.mark.parametrize("kind", FORMATS)
def test_words_do_not_change_with_the_images_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = published(kind, tmp_path, monkeypatch)

    def words(size: tuple[int, int]) -> str:
        ids = torch.tensor(family.encode(QUESTION, [IMAGE.resize(size)]).tokens["input_ids"])
        return str(family.tokenizer.decode(ids[family.is_text(ids)]))

    assert words((20, 20)) == words((60, 20)) == words((9, 40))
    assert QUESTION in words((20, 20)) and "<" not in words((20, 20))


def test_an_answer_that_would_run_into_its_prompt_stands_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that ends in a space: read together, the space belongs to the answer's first word. Generation starts behind the
    space, so training does, too."""
    template = llava().replace("ASSISTANT:{% endif %}", "{{ 'ASSISTANT: ' }}{% endif %}")
    family = published("llava", tmp_path, monkeypatch, template)
    prompt = family.prompt(QUESTION, 0)
    assert prompt.endswith("ASSISTANT: ") and family.opening == ""

    def ids_of(text: str) -> list[int]:
        ids: list[int] = family.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    first, both = ids_of(prompt), ids_of(f"{prompt}red</s>")
    assert both[: len(first)] != first, "the tokenizer was to merge them"
    row = family.encode(QUESTION, [], "red")
    assert row.tokens["input_ids"] == [family.tokenizer.bos_token_id, *first, *ids_of("red</s>")]
    assert row.tokens["input_ids"][row.prompt_tokens :] == ids_of("red</s>")


def family_of(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    return published("llava_onevision", tmp_path, monkeypatch, template, eos_token="</s>")


def test_a_turn_that_begins_otherwise_still_tells_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-OneVision's template, and an end that is not the tokenizer's own."""
    template = FORMATS["llava_onevision"].template
    assert template is not None
    family = family_of(template, tmp_path, monkeypatch)
    assert (family.opening, family.end) == ("", "<|im_end|>")
    family = family_of(template.replace("<|im_end|>", "."), tmp_path, monkeypatch)
    assert (family.opening, family.end) == ("", "</s>"), "no special token behind an answer: the tokenizer's end"


def test_a_template_without_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"writes no text of an assistant's turn, found '\?'; training needs one"):
        family_of(template, tmp_path, monkeypatch)
