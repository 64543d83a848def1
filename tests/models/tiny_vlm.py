"""Small random vision-language models of transformers' real classes, saved with tokenizer, processor and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from digrap_scale.models.processors import _images_only

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


def llava_onevision() -> tuple[PreTrainedModel, Any]:
    """Tiles: one, or two beside or above each other, with the whole image in front."""
    tok = tokenizer("<video>")
    grid = [[16, 16], [16, 32], [32, 16]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=grid)
    processor = _images_only(LlavaOnevisionProcessor)(
        images,
        tok,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=IM_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        text_config={"model_type": "qwen2", **text(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(config_class: Any, model_class: Any, processor_class: Any, **vision: Any) -> tuple[PreTrainedModel, Any]:
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tok = tokenizer(*names)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 256}
    )
    processor = _images_only(processor_class)(
        images, tok, None, chat_template=IM_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    )
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                   tok.convert_tokens_to_ids(names), strict=True))  # fmt: skip
    config = config_class(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 16,
            **vision,
        },
        text_config=text(tok, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}),
        **ids,
    )
    return model_class(config), processor


def qwen2_5_vl() -> tuple[PreTrainedModel, Any]:
    return _qwen(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        window_size=16,
        fullatt_block_indexes=[1],
    )


def qwen3_vl() -> tuple[PreTrainedModel, Any]:
    return _qwen(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )


def _idefics(config_class: Any, model_class: Any, processor: Any, images: Any) -> tuple[PreTrainedModel, Any]:
    """Every image is cut into two by two tiles, with the whole in front."""
    tiles = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    tok = tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles)
    template = IM_TEMPLATE.replace("IMAGE", "<image>").replace("<|im_end|>", "<end_of_utterance>")
    config = config_class(
        vision_config={**VISION, "patch_size": 4},
        text_config={"model_type": "llama", **text(tok)},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    parts = [images(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}), tok]
    if "video_processor" in processor.get_attributes():
        parts.append(None)
    return model_class(config), processor(*parts, image_seq_len=4, chat_template=template)


def idefics3() -> tuple[PreTrainedModel, Any]:
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, Idefics3ImageProcessorPil)


def smolvlm() -> tuple[PreTrainedModel, Any]:
    processor = _images_only(SmolVLMProcessor)
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, processor, SmolVLMImageProcessorPil)


MAKERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "llava": llava,
    "paligemma": paligemma,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


def save_tiny_vlm(kind: str, folder: Path) -> Path:
    """A model of ``kind`` in Hugging Face layout; its weights are large enough for answers to differ."""
    torch.manual_seed(5)
    model, processor = MAKERS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(12.0)
    model.save_pretrained(folder)
    if getattr(processor, "video_processor", 0) is not None:
        processor.save_pretrained(folder)
        return folder
    # A class that wants a video processor cannot be saved without one: written as its parts, as older repositories are.
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    settings = {
        name: getattr(processor, name)
        for name in ("num_image_tokens", "vision_feature_select_strategy", "image_seq_len")
        if hasattr(processor, name)
    }
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": type(processor).__name__, **settings}))
    return folder
