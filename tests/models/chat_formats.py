"""How published checkpoints of each family put a question and an answer, as their model cards tell it, and a BPE tokenizer.

The templates are written anew: what counts is the text that comes out, which stands beside each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from digrap_scale.models.families import Family, build_family
from tests.models import tiny_vlm

QUESTION = "What colour is the bus?"
_TEXTS = [
    QUESTION,
    "USER: What is this? ASSISTANT: a cat",
    "User: How many dogs are there? Assistant: two dogs",
    "You are a helpful assistant.",
    "user assistant system",
    "the red fire engine and the red bus, 3.5 and 12 cats",
]


def llava(start: str = "") -> str:
    return (
        start + "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] if c['type'] == 'image' %}"
        "{{ '<image>\\n' }}{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% for c in m['content'] if c['type'] == 'image' %}<image>"
    "{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ '\\n' + c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_ml(system: str = "") -> str:
    return (
        system + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def user_colon(start: str) -> str:
    """No space between "User:" and an image."""
    return (
        start
        + "{% for m in messages %}{{ m['role'] | capitalize }}:{% if m['content'][0]['type'] != 'image' %}{{ ' ' }}"
        "{% endif %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


@dataclass(frozen=True)
class Format:
    """A family's words.

    Attributes:
        template: the chat template; None where there is none.
        prompt: what ``QUESTION`` about an image becomes.
        opening: what stands between it and an answer.
        end: the token that ends an answer.
        eos, bos: the tokenizer's.
        adds_bos: whether the tokenizer puts ``bos`` in front by itself.
    """

    template: str | None
    prompt: str
    opening: str
    end: str
    eos: str
    bos: str | None
    adds_bos: bool = False


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_IM = f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
FORMATS = {
    # llava-hf/llava-1.5-7b-hf: no token at the end of a turn
    "llava": Format(llava(), f"USER: <image>\n{QUESTION} ASSISTANT:", " ", "</s>", "</s>", "<s>", True),
    # llava-hf/llava-onevision-qwen2-*: "assistant \n" in a turn that is there, "assistant\n" where one is generated
    "llava_onevision": Format(
        ONEVISION, f"<|im_start|>user <image>\n{QUESTION}<|im_end|><|im_start|>assistant\n", "", "<|im_end|>", "<|im_end|>", None
    ),
    "qwen2_5_vl": Format(
        chat_ml("{{ '" + SYSTEM.replace("\n", "\\n") + "' }}"), f"{SYSTEM}<|im_start|>user\n{_IM}", "", "<|im_end|>",
        "<|im_end|>", None,
    ),
    "qwen3_vl": Format(chat_ml(), f"<|im_start|>user\n{_IM}", "", "<|im_end|>", "<|im_end|>", None),
    # HuggingFaceM4/Idefics3-8B-Llama3, HuggingFaceTB/SmolVLM-*: the template itself begins with the first token
    "idefics3": Format(
        user_colon("<s>"), f"<s>User:<image>{QUESTION}<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>",
        "<end_of_utterance>", "<s>", True,
    ),
    "smolvlm": Format(
        user_colon("<|im_start|>"), f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant:", " ",
        "<end_of_utterance>", "<end_of_utterance>", "<|im_start|>",
    ),
    # google/paligemma-*: prefix, a line's end, suffix; the processor writes the image tokens in front
    "paligemma": Format(None, f"<s>{QUESTION}\n", "", "</s>", "</s>", "<s>"),
}  # fmt: skip


def bpe_tokenizer(
    *extra: str, bos: bool = False, eos_token: str = "</s>", bos_token: str | None = "<s>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, trained here on a few texts: words are several tokens, and spaces belong to them."""
    special = [*tiny_vlm.SPECIAL, *extra]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS * 3, trainer)
    if adds_bos and bos_token is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, special.index(bos_token))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token=eos_token,
        bos_token=bos_token,
        additional_special_tokens=special[4:],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def published(kind: str, folder: Any, patch: pytest.MonkeyPatch, template: str | None = None, **tokens: Any) -> Family:
    """The family of ``kind`` with its published form (or another template, other tokens) and a BPE tokenizer."""
    form = FORMATS[kind]
    tokens = {"eos_token": form.eos, "bos_token": form.bos, "adds_bos": form.adds_bos, **tokens}
    make: Callable[..., Any] = partial(bpe_tokenizer, **tokens)
    patch.setattr(tiny_vlm, "tokenizer", make)
    model, processor = tiny_vlm.MAKERS[kind]()
    processor.chat_template = template or form.template
    return build_family(model.config, processor, folder)
