"""Small random vision-language models of transformers' real classes, saved with tokenizer, processor and chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
WORDS = ["\n", ":", "?", ",", ".", "user", "assistant", "what", "is", "this", "how", "many", "in", "picture", "colour"]
WORDS += ["cat", "dog", "red", "green", "blue", "one", "two", "yes", "no", "fire", "engine", "a", "the", "answer", "en"]

IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As LLaVA-1.5's: turns by name, images first, and no token at the end of a turn.
USER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(*extra: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; a line's end is one too. ``bos``: prompts begin with it."""
    words = [*SPECIAL, *extra, *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL[4:], *extra],
        model_input_names=["input_ids", "attention_mask"],
    )


def size(tok: PreTrainedTokenizerFast) -> int:
    return len(tok)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def text(tok: PreTrainedTokenizerFast, **settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(tok),
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **settings,
    }


def llava() -> tuple[PreTrainedModel, Any]:
    tok = tokenizer(bos=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=USER_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        text_config={"model_type": "llama", **text(tok)},
        image_token_index=SPECIAL.index("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def paligemma() -> tuple[PreTrainedModel, Any]:
    tok = tokenizer()
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "projection_dim": 16, **VISION},
        text_config={"model_type": "gemma", **text(tok)},
        image_token_index=SPECIAL.index("<image>"),
        projection_dim=16,
        hidden_size=16,
    )
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tok)


MAKERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {"llava": llava, "paligemma": paligemma}


def save_tiny_vlm(kind: str, folder: Path) -> Path:
    """A model of ``kind`` in Hugging Face layout; its weights are large enough for answers to differ."""
    torch.manual_seed(5)
    model, processor = MAKERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
