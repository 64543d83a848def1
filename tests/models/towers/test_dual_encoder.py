"""The dual encoder and its text table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from digrap_scale.errors import ConfigError
from digrap_scale.models.towers import DualEncoderConfig, DualEncoderModel, TextTable

VISION = {"stages": [[1, 3, 1, 1, 8], [1, 3, 2, 6, 12]], "stem_channels": 8, "hidden_size": 16}


def small_model(texts: int = 4) -> DualEncoderModel:
    torch.manual_seed(0)
    model = DualEncoderModel(DualEncoderConfig(vision_config=VISION, projection_dim=6, num_texts=texts)).eval()
    model.set_text_table(torch.nn.functional.normalize(torch.randn(texts, 6), dim=-1))
    return model


def test_logits_are_scaled_cosines_of_the_chosen_rows() -> None:
    model = small_model()
    pixels = torch.randn(3, 3, 16, 16)
    rows = torch.tensor([[2], [0]])
    output = model(input_ids=rows, pixel_values=pixels, attention_mask=torch.ones_like(rows))
    features = model.get_image_features(pixels)
    expected = torch.stack(
        [
            torch.stack([torch.cosine_similarity(image, model.text_embeddings[row], dim=0) for row in (2, 0)])
            for image in features
        ]
    )
    torch.testing.assert_close(output.logits_per_image, expected * math.exp(2.6592), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    assert output.loss is None


def test_loss_is_symmetric_and_temperature_is_bounded() -> None:
    model = small_model(3)
    rows, pixels = torch.arange(3).reshape(3, 1), torch.randn(3, 3, 16, 16)
    output = model(input_ids=rows, pixel_values=pixels, return_loss=True)
    images, texts = output.logits_per_image.log_softmax(1), output.logits_per_text.log_softmax(1)
    torch.testing.assert_close(output.loss, -(images.diagonal().mean() + texts.diagonal().mean()) / 2)
    model.logit_scale.data.fill_(50.0)
    assert model(input_ids=rows, pixel_values=pixels).logits_per_image.abs().max().item() <= 100.001


def test_table_is_frozen_and_everything_else_trains() -> None:
    model = small_model(3)
    names = dict(model.named_parameters())
    assert "text_embeddings" not in names and "text_embeddings" in model.state_dict()
    assert names["logit_scale"].shape == (1,)  # FSDP2 refuses zero-dimensional parameters
    output = model(input_ids=torch.arange(3).reshape(3, 1), pixel_values=torch.randn(3, 3, 16, 16), return_loss=True)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in names.values())


def test_saved_model_comes_back_through_the_auto_classes(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DualEncoderConfig)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, DualEncoderModel)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = {"input_ids": torch.tensor([[1], [3]]), "pixel_values": torch.randn(2, 3, 16, 16)}
    torch.testing.assert_close(again.eval()(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_table_of_another_size_follows_into_the_config(tmp_path: Path) -> None:
    model = small_model(4)
    model.set_text_table(torch.eye(6))
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).text_embeddings.shape == (6, 6)
    with pytest.raises(ValueError, match="expected \\[T, 6\\]"):
        model.set_text_table(torch.eye(5))


def test_text_table_gives_row_numbers(tmp_path: Path) -> None:
    TextTable(["a cat", "a dog", "a fée"]).save_pretrained(tmp_path)
    table = TextTable.from_pretrained(tmp_path)
    tokens = table(["a fée", "a cat"], return_tensors="pt", padding=True)
    assert tokens["input_ids"].tolist() == [[2], [0]]
    assert tokens["attention_mask"].tolist() == [[1], [1]]
    assert table("a dog")["input_ids"].tolist() == [[1]]
    assert len(table) == 3


def test_unknown_text_names_text_file_and_nearest(tmp_path: Path) -> None:
    TextTable(["a cat", "a dog"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'a cap'.*'a cat'") as caught:
        TextTable.from_pretrained(tmp_path)(["a cap"])
    assert str(tmp_path / "texts.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        (json.dumps({"a": 1}), "list of texts"),
        ('["a", "a"]', "occurs twice"),
    ],
)
def test_bad_table_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "texts.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        TextTable.from_pretrained(tmp_path)
