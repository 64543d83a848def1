"""The small VLM's parts: its vocabulary, tokenizer, processor and architecture. Used by ``pretrain_pictogram_vlm.py``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictograms as pg

from digrap_scale.demo import scenes
from digrap_scale.models.towers import DualEncoderModel, EfficientNetLiteTokensConfig
from digrap_scale.models.towers.image_processor import image_processor
from digrap_scale.models.towers.token_tower import TOKEN_PIXELS

PAGE = 2 * scenes.TILE
IMAGE_TOKENS = (PAGE // TOKEN_PIXELS) ** 2
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
PLACE_SCALE = 0.5  # about the features' own standard deviation (0.58)
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE)
# easy-vqa, the far set, asks in words of its own; they have rows of the embedding, but are never trained.
FAR_WORDS = (
    "a an and are blue black brown circle color contain contains does gray green have image is it of present rectangle "
    "red shape teal there triangle what which yellow no not yes the in not"
).split()
LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,  # about 1/√width; Llama's 0.02 is for wider models
}
# LLaVA-1.5's turns
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, then every word and mark that questions, answers, names and turns use, sorted."""
    slots = {"cell": scenes.CELLS, "noun": (*scenes.NOUNS.values(), scenes.THINGS)}
    texts = [
        "user: assistant: nothing, .?",
        *scenes.CELLS,
        *scenes.COUNTS,
        *scenes.CAPTIONS.values(),
        "yes no",
        *FAR_WORDS,
    ]
    for forms in scenes.WORDINGS.values():
        texts += [re.sub(r"\{\w+\}", " ", wording) for wordings in forms.values() for wording in wordings]
    for noun in slots["noun"]:
        texts += [f"a an {noun}", f"{noun}s"]
    texts += [scenes.words(concept) for concept in pg.make_split().label]
    splitter = pre_tokenizers.Whitespace()
    found = {token for text in texts for token, _ in splitter.pre_tokenize_str(text.lower())}
    return [*SPECIAL, *sorted(found)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of ``vocabulary()``, lower case, which starts every text with ``<s>``."""
    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokens.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=LANGUAGE_MODEL["max_position_embeddings"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaProcessor:
    """Pages of ``PAGE`` × ``PAGE`` pixels, ``IMAGE_TOKENS`` tokens each; LLaVA-1.5's turns."""
    return LlavaProcessor(
        image_processor=image_processor(PAGE),
        tokenizer=make_tokenizer(),
        patch_size=TOKEN_PIXELS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_config() -> LlavaConfig:
    """The architecture: EfficientNet-Lite0, LLaVA's projector, a small Llama with tied embeddings."""
    tokens = vocabulary()
    ids: dict[str, Any] = {
        f"{name}_token_id": tokens.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))
    }
    text = LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=True, **LANGUAGE_MODEL, **ids)
    return LlavaConfig(
        vision_config=EfficientNetLiteTokensConfig(window_pixels=scenes.TILE, place_scale=PLACE_SCALE),
        text_config=text,
        image_token_index=tokens.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ids,
    )


def make_model(foundation: Path, seed: int) -> LlavaForConditionalGeneration:
    """The VLM before its training: the image tower of the CLIP-style foundation model, all else drawn from ``seed``."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config())
    model.model.vision_tower.load_state_dict(read_foundation(foundation).vision_model.state_dict())
    return model


def read_foundation(folder: Path) -> DualEncoderModel:
    """The CLIP-style foundation model, in float32."""
    aligned = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(aligned, DualEncoderModel)
    return aligned


def write_vocabulary(folder: Path) -> None:
    """Write ``vocabulary.json``, for a reader's eyes."""
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=0) + "\n", encoding="utf-8")
