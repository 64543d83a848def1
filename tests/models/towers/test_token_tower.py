"""The tower of tokens: the map's places in order, the same weights, and LLaVA around it through the Auto classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from digrap_scale.models.towers import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    EfficientNetLiteTokensConfig,
    EfficientNetLiteTokensModel,
)
from digrap_scale.models.towers.token_tower import place_code
from tests.models.tiny import SMALL_STAGES

SIZES = {"stages": SMALL_STAGES, "stem_channels": 4, "hidden_size": 16}


def test_tokens_are_the_map_row_by_row() -> None:
    torch.manual_seed(0)
    tower = AutoModel.from_config(EfficientNetLiteTokensConfig(**SIZES)).eval()
    assert isinstance(tower, EfficientNetLiteTokensModel)
    plain = EfficientNetLiteModel(EfficientNetLiteConfig(**SIZES)).eval()
    plain.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 12, 20)
    tokens, feature_map = tower(pixels).last_hidden_state, plain(pixels).last_hidden_state
    batch, channels, height, width = feature_map.shape
    assert tokens.shape == (batch, height * width, channels) and height != width
    for row in range(height):
        for column in range(width):
            assert torch.equal(tokens[:, row * width + column], feature_map[:, :, row, column])


def test_windows_are_read_alone_and_put_together_in_order() -> None:
    torch.manual_seed(0)
    tower = EfficientNetLiteTokensModel(EfficientNetLiteTokensConfig(**SIZES, window_pixels=8)).eval()
    alone = EfficientNetLiteModel(EfficientNetLiteConfig(**SIZES)).eval()
    alone.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 16, 24)  # 2 × 3 windows of 2 × 2 tokens
    tokens = tower(pixels).last_hidden_state.reshape(2, 4, 6, -1)
    for row in range(2):
        for column in range(3):
            window = pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = alone(window).last_hidden_state.permute(0, 2, 3, 1)
            found = tokens[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="multiples of window_pixels"):
        tower(torch.zeros(1, 3, 8, 12))


def test_places_on_the_page_are_told_apart_in_windows_of_the_same_content() -> None:
    torch.manual_seed(0)
    settings = {**SIZES, "window_pixels": 8}
    plain = EfficientNetLiteTokensModel(EfficientNetLiteTokensConfig(**settings)).eval()
    tower = EfficientNetLiteTokensModel(EfficientNetLiteTokensConfig(**settings, place_scale=0.5)).eval()
    tower.load_state_dict(plain.state_dict())
    pixels = torch.randn(1, 3, 8, 8).repeat(1, 1, 2, 3)  # six times the same window: 4 × 6 tokens
    before, after = plain(pixels).last_hidden_state, tower(pixels).last_hidden_state
    assert len(before[0].unique(dim=0)) == 4 and len(after[0].unique(dim=0)) == 24
    added = ((after - before)[0] / 0.5).reshape(4, 6, 16)
    torch.testing.assert_close(added[2, 5, :8], added[2, 0, :8])  # the row
    torch.testing.assert_close(added[3, 4, 8:], added[0, 4, 8:])  # the column
    # rows 0 … 3 at wavelengths 2π · 32^(0, ⅓, ⅔, 1): sines, then cosines
    torch.testing.assert_close(added[3, 0, :4], torch.sin(3 / 32 ** (torch.arange(4) / 3)))
    torch.testing.assert_close(added[3, 0, 4:8], torch.cos(3 / 32 ** (torch.arange(4) / 3)))
    with pytest.raises(ValueError, match="multiple of 4"):
        place_code(2, 2, 18)


def test_hidden_states_are_given_when_asked_for() -> None:
    tower = EfficientNetLiteTokensModel(EfficientNetLiteTokensConfig(**SIZES)).eval()
    pixels = torch.zeros(1, 3, 8, 8)
    assert tower(pixels).hidden_states is None and tower(pixels, output_hidden_states=False).hidden_states is None
    for asked in (True, -1, [-1]):  # LLaVA asks by layer number
        output = tower(pixels, output_hidden_states=asked)
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    with pytest.raises(IndexError):
        tower(pixels, output_hidden_states=-2).hidden_states[-2]


def test_llava_takes_it_and_reads_it_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=EfficientNetLiteTokensConfig(**SIZES),
        text_config=text,
        image_token_index=19,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again.model.vision_tower, EfficientNetLiteTokensModel)
    ids = torch.tensor([[1, 19, 19, 19, 19, 5, 6]])
    pixels = torch.randn(1, 3, 8, 8)  # stride 4: 2 × 2 tokens
    told = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(told, again(input_ids=ids, pixel_values=pixels).logits)
    assert not torch.equal(told, model(input_ids=ids, pixel_values=pixels + 1).logits)
