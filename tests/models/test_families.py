"""How each family is asked: what is supervised, what padding does, several images, none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from digrap_scale.errors import ConfigError
from digrap_scale.models.families import Family, build_family
from digrap_scale.models.processors import load_processor
from digrap_scale.types import IGNORED
from tests.models.tiny_vlm import MAKERS, save_tiny_vlm

# The token that ends an answer; of the others it is <|im_end|>.
ENDS = {"llava": "</s>", "paligemma": "</s>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    config = AutoConfig.from_pretrained(folder)
    return build_family(config, load_processor(folder, config, False), folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def picture(color: tuple[int, int, int], width: int = 20, height: int = 20) -> Image.Image:
    return Image.new("RGB", (width, height), color)


# question, images, answer
SAMPLES: list[tuple[str, list[Image.Image], str]] = [
    ("what is this ?", [picture((200, 30, 30))], "cat"),
    ("how many in the picture ?", [picture((0, 200, 0), 30, 14), picture((9, 9, 200), 12, 40)], "two"),
    ("what colour is a fire engine ?", [], "red"),
    ("what is in this picture ?", [picture((0, 0, 0), 13, 29)], "a fire engine"),
]


def test_supervised_tokens_are_the_answer_and_its_end(kind: str, family: Family) -> None:
    """Decoded, they read as the answer; what stands before them is exactly what generation starts from."""
    rows = [family.encode(*sample) for sample in SAMPLES]
    inputs = family.join(rows, left=False)
    labels = family.supervised(rows, inputs["input_ids"].shape[1])
    prompts = [family.encode(question, images) for question, images, _ in SAMPLES]
    for number, (row, prompt, (_, _, answer)) in enumerate(zip(rows, prompts, SAMPLES, strict=True)):
        ids, own = inputs["input_ids"][number], labels[number]
        assert family.decode(own[own != IGNORED][None]) == [answer]
        assert family.tokenizer.decode(own[own != IGNORED][-1]) == ENDS.get(kind, "<|im_end|>")
        assert torch.equal(own[own != IGNORED], ids[row.prompt_tokens : len(row)])
        assert row.tokens["input_ids"][: row.prompt_tokens] == prompt.tokens["input_ids"]
        assert len(prompt) == prompt.prompt_tokens == row.prompt_tokens
        mask = inputs["attention_mask"][number]
        assert mask.tolist() == [1] * len(row) + [0] * (len(mask) - len(row)), "padding is on the right"
        assert (own[mask == 0] == IGNORED).all()
        assert "<unk>" not in family.tokenizer.decode(ids[: len(row)])


def test_generation_is_padded_on_the_left(family: Family) -> None:
    rows = [family.encode(question, images) for question, images, _ in SAMPLES]
    mask = family.join(rows, left=True)["attention_mask"]
    for number, row in enumerate(rows):
        assert mask[number].tolist() == [0] * (mask.shape[1] - len(row)) + [1] * len(row)


def test_image_tokens_are_as_many_as_features(family: Family, model: Any) -> None:
    """transformers itself refuses a batch in which they differ; a batch without images gets a row that has some."""
    text_only = [family.encode(*SAMPLES[2])]
    inputs = family.join(text_only, left=False)
    assert len(inputs["input_ids"]) == 2, "a blank row, so that the tower runs"
    image_tensors = [name for name in inputs if name.startswith("pixel_values")]
    assert image_tensors
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    every = family.join([family.encode(*sample) for sample in SAMPLES], left=False)
    with torch.no_grad():
        assert torch.isfinite(model(**every).logits).all()


def test_a_batch_answers_as_its_samples_alone(family: Family, model: Any) -> None:
    """Logits do not depend on what else is in the batch, on either side of padding; nor do generated answers."""
    settings = GenerationConfig(
        max_new_tokens=5, do_sample=False, eos_token_id=family.end_ids, pad_token_id=family.pad_id
    )
    rows = [family.encode(*sample) for sample in SAMPLES]
    prompts = [family.encode(question, images) for question, images, _ in SAMPLES]
    with torch.no_grad():
        together = model(**family.join(rows, left=False)).logits
        inputs = family.join(prompts, left=True)
        new = [
            ids[inputs["input_ids"].shape[1] :] for ids in model.generate(**inputs, generation_config=settings).tolist()
        ]
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone = model(**family.join([row], left=False)).logits[0, : len(row)]
            torch.testing.assert_close(together[number, : len(row)], alone, atol=2e-4, rtol=1e-4)
            one = family.join([prompt], left=True)
            ids = model.generate(**one, generation_config=settings)[0, one["input_ids"].shape[1] :].tolist()
            ids += [family.pad_id] * (len(new[number]) - len(ids))
            assert ids == new[number]
    assert len({tuple(ids) for ids in new}) > 1, "all answers alike show nothing"


def test_a_folder_without_template_is_told(tmp_path: Path) -> None:
    save_tiny_vlm("llava", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        build_family(config, load_processor(tmp_path, config, False), tmp_path)
