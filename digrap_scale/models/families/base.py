"""How a vision-language model is asked and answers: prompt, tokens, image tensors. A family's file holds only what differs.

A sample goes through the model's own processor, alone; batches are joined here. So text, one image and several images a
sample can stand in one batch, and each side of padding is ours.
"""

# B samples of a batch, R rows that they share, T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from digrap_scale.errors import ConfigError
from digrap_scale.models.families.packing import first_fit
from digrap_scale.types import IGNORED

# What the processor gives for each token, and the value that padding has there (None: the tokenizer's padding token).
TOKEN_FIELDS: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
_BLANK_SIDE = 32
_MARK = "\u241eanswer\u241e"  # stands for the answer while a chat template is read


@dataclass(frozen=True)
class Encoded:
    """One sample as the model takes it.

    Attributes:
        tokens: field (``input_ids``, ``attention_mask``, …) → a value for each token.
        prompt_tokens: how many of them belong to the prompt; the rest is the answer and its end.
        images: the processor's tensors of the sample's images; empty without any.
    """

    tokens: dict[str, list[int]]
    prompt_tokens: int
    images: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])


class Family:
    """Models that are asked through their chat template; the base of the others.

    Attributes:
        wrap: class names of blocks that FSDP2 shards beside those that the model itself names (``_no_split_modules``).
        blank_options: the processor's options for an image that stands where there is none.
        keeps_logits: whether the model's forward takes ``logits_to_keep``, the columns to compute logits of.
        answer_values: fields whose value at an answer's tokens is not 0.
    """

    wrap: tuple[str, ...] = ()
    blank_options: dict[str, Any] = {}
    answer_values: dict[str, int] = {"attention_mask": 1}
    keeps_logits = False

    def __init__(self, processor: Any, *, generation_ends: Sequence[int] = (), limit: int | None = None) -> None:
        """
        Args:
            processor: transformers' processor of the model.
            generation_ends: ids at which the checkpoint's own generation config stops.
            limit: the most tokens that the model has positions for; None if it does not say.

        Raises:
            ConfigError: no chat template, or one that leaves answers out; no padding or end token.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.limit = limit
        self._blank_tokens: int | None = None
        self._text_ids: dict[int, bool] = {}
        self.check()
        self.pad_id: int = self.tokenizer.pad_token_id
        if self.pad_id is None:
            raise ConfigError("model.path: the tokenizer has no padding token; set pad_token in tokenizer_config.json")
        self.opening, self.end = self.turn()
        end_id = self.tokenizer.convert_tokens_to_ids(self.end) if self.end else None
        if end_id is None:
            raise ConfigError("model.path: the tokenizer has no end token; set eos_token in tokenizer_config.json")
        self.end_ids: list[int] = sorted({int(end_id), *generation_ends})

    def check(self) -> None:
        """Raises: ConfigError where the folder lacks what this family is asked through."""
        if not self.template:
            raise ConfigError(
                "model.path: the processor has no chat template; add chat_template.jinja to the folder (docs/vlm.md)"
            )

    @property
    def template(self) -> str | None:
        """The chat template: the processor's, or its tokenizer's."""
        return getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)

    def turn(self) -> tuple[str, str]:
        """What stands between prompt and answer, and the token that ends an answer, as the chat template has them.

        Where the template begins a turn that holds an answer otherwise than one that is to be generated (LLaVA-OneVision: a
        space more), answers follow on the latter directly. The end is the first special token behind an answer, or, should
        the template put none there (LLaVA-1.5), the tokenizer's ``eos_token``.

        Raises:
            ConfigError: the template leaves answers out.
        """
        prompt = self.prompt("?", 0)
        whole = self._rendered([self._asked("?", 0), {"role": "assistant", "content": [_text(_MARK)]}], False)
        head, mark, after = whole.partition(_MARK)
        if not mark:
            raise ConfigError(
                f"model.path: the chat template writes no text of an assistant's turn, found {whole!r}; "
                "training needs one that does: correct chat_template.jinja"
            )
        before = head.removeprefix(prompt) if head.startswith(prompt) else ""
        special = [token for token in self.tokenizer.all_special_tokens if token and token in after]
        return before, min(special, key=after.index) if special else self.tokenizer.eos_token

    def prompt(self, question: str, images: int) -> str:
        """The text that is put to the model, a placeholder for each image, up to where its answer begins."""
        return self._rendered([self._asked(question, images)], True)

    def _asked(self, question: str, images: int) -> dict[str, Any]:
        return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), _text(question)]}

    def _rendered(self, messages: list[dict[str, Any]], to_answer: bool) -> str:
        # The tokenizer's method, not the processor's: the latter asks a video processor for settings, even without videos.
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=to_answer, tokenize=False
        )
        return text

    def encode(self, question: str, images: Sequence[Any], answer: str | None = None, **options: Any) -> Encoded:
        """Prompt, images and maybe an answer → tokens and tensors.

        The prompt's tokens are those that generation starts from; the answer's are what the tokenizer adds to them when it
        reads both together, or, should the two run into each other, those of the answer by itself.

        Args:
            question: the user's whole text.
            images: PIL images, in order.
            answer: what the model should say; None leaves it to be generated.
            options: for the image processor.
        """
        prompt = self.prompt(question, len(images))
        tokens, tensors = self.encode_prompt(prompt, images, **options)
        prompt_tokens = len(tokens["input_ids"])
        if answer is not None:
            more = self.continuation(question, len(images), answer)
            for name, values in tokens.items():
                values += more[name]
        return Encoded(tokens, prompt_tokens, tensors)

    def continuation(self, question: str, images: int, answer: str) -> dict[str, list[int]]:
        """The answer and its end, as they follow on the prompt: a value for each token in every field."""
        ids = self._answer_ids(self.prompt(question, images), f"{self.opening}{answer.strip()}{self.end}")
        other = {name: [self.answer_values.get(name, 0)] * len(ids) for name in TOKEN_FIELDS}
        return {**other, "input_ids": ids}

    def encode_prompt(
        self, prompt: str, images: Sequence[Any], **options: Any
    ) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
        """The processor's fields for each token, and its tensors of the images."""
        special = not (self.tokenizer.bos_token and prompt.startswith(self.tokenizer.bos_token))
        if images:
            out = self.processor(text=[prompt], images=[list(images)], add_special_tokens=special, **options)
        else:
            out = self.tokenizer([prompt], add_special_tokens=special)
        tokens = {name: _row(out[name]) for name in TOKEN_FIELDS if name in out}
        tensors = {name: _tensor(value) for name, value in out.items() if name not in (*TOKEN_FIELDS, "labels")}
        return tokens, tensors

    def _answer_ids(self, prompt: str, continuation: str) -> list[int]:
        first, both, alone = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, prompt + continuation, continuation)
        )
        ids: list[int] = both[len(first) :] if both[: len(first)] == first else alone
        return ids

    def blank(self) -> Encoded:
        """A row with one image and no supervised token: with it, a batch without images runs the vision tower like all others."""
        image = Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE), (255, 255, 255))
        return self.encode("", [image], **self.blank_options)

    def join(self, rows: Sequence[Encoded], *, left: bool) -> dict[str, torch.Tensor]:
        """Rows → model inputs [B, T] and the images' tensors.

        Args:
            rows: samples; with none that has an image, a blank row is added at the end.
            left: pad on the left, for generation, else on the right.
        """
        rows = list(rows)
        if not any(row.images for row in rows):
            rows.append(self.blank())
        length = max(len(row) for row in rows)
        names = dict.fromkeys(name for row in rows for name in row.tokens)
        inputs = {}
        for name in names:
            value = TOKEN_FIELDS[name]
            fill = self.pad_id if value is None else value
            padded = []
            for row in rows:
                own = row.tokens.get(
                    name, [0] * len(row)
                )  # a row of text may lack a field that tells images' tokens apart
                padding = [fill] * (length - len(own))
                padded.append(padding + own if left else own + padding)
            inputs[name] = torch.tensor(padded, dtype=torch.int64)
        for name in dict.fromkeys(name for row in rows for name in row.images):
            inputs[name] = join_tensors([row.images[name] for row in rows if name in row.images])
        return inputs

    def pack(self, samples: Sequence[Encoded], row_tokens: int) -> dict[str, torch.Tensor]:
        """Samples, several in a row → model inputs, images' tensors in the rows' order, and ``position_ids``, ``labels`` and
        ``sample_ids`` (whose token it is; −1: nobody's), all [R, T]. See ``packing.py``.

        Args:
            samples: none longer than ``row_tokens``.
            row_tokens: the most tokens of a row.
        """
        rows = first_fit([len(sample) for sample in samples], row_tokens)
        inputs = self.join([_merged([samples[i] for i in row]) for row in rows], left=False)
        del inputs["attention_mask"]
        shape = inputs["input_ids"].shape
        # Padding: each token for itself, at position 0. Of a blank row at the end nothing is supervised; its image runs the
        # tower all the same.
        positions = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        owners = torch.full(shape, -1, dtype=torch.int64)
        for number, row in enumerate(rows):
            start = 0
            for i in row:
                stop = start + len(samples[i])
                positions[number, start:stop] = torch.arange(stop - start)
                labels[number, start:stop] = self.supervised([samples[i]], stop - start)[0]
                owners[number, start:stop] = i
                start = stop
        return {**inputs, "position_ids": positions, "labels": labels, "sample_ids": owners}

    def computed_tokens(self, samples: Sequence[Encoded], row_tokens: int | None) -> int:
        """Tokens of the forward of ``samples``, padding included: [R, T] of ``join``, or of ``pack`` with ``row_tokens``."""
        lengths = [len(sample) for sample in samples]
        if row_tokens is not None:
            lengths = [sum(lengths[i] for i in row) for row in first_fit(lengths, row_tokens)]
        if not any(sample.images for sample in samples):
            if self._blank_tokens is None:
                self._blank_tokens = len(self.blank())
            lengths.append(self._blank_tokens)
        return len(lengths) * max(lengths)

    def supervised(self, rows: Sequence[Encoded], width: int) -> torch.Tensor:
        """[B, T] labels for right-padded ``rows``: the answer's tokens and its end; ``IGNORED`` elsewhere."""
        labels = [
            [IGNORED] * row.prompt_tokens
            + row.tokens["input_ids"][row.prompt_tokens :]
            + [IGNORED] * (width - len(row))
            for row in rows
        ]
        return torch.tensor(labels, dtype=torch.int64)

    def is_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are words: bool, shaped as ``ids`` (int64).

        Not: the tokenizer's special tokens (images, tiles and what stands around them, turns, ends), and white space alone,
        which processors put between tiles. A token for unknown words is one, unless it has another part as well.
        """
        tokenizer = self.tokenizer
        found = ids.unique().tolist()
        new = [one for one in found if one not in self._text_ids]
        if new:
            special = {one for one, token in tokenizer.added_tokens_decoder.items() if token.special}
            special |= set(tokenizer.all_special_ids)
            if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
                special.discard(tokenizer.unk_token_id)
            for one in new:
                self._text_ids[one] = one not in special and bool(tokenizer.decode([one]).strip())
        words = torch.tensor([one for one in found if self._text_ids[one]], dtype=ids.dtype, device=ids.device)
        return torch.isin(ids, words)

    def decode(self, ids_BT: torch.Tensor) -> list[str]:
        """Generated ids → texts, without special tokens and outer spaces."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


def _merged(samples: Sequence[Encoded]) -> Encoded:
    """Samples one behind the other, and their images in the same order."""
    names = dict.fromkeys(name for sample in samples for name in sample.tokens)
    tokens = {name: [v for s in samples for v in s.tokens.get(name, [0] * len(s))] for name in names}
    images = dict.fromkeys(name for sample in samples for name in sample.images)
    tensors = {name: join_tensors([s.images[name] for s in samples if name in s.images]) for name in images}
    return Encoded(tokens, len(tokens["input_ids"]), tensors)


def join_tensors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the first axis; other axes are filled up with zeros to the largest (tiles that a smaller image does not have)."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    joined = tensors[0].new_zeros((sum(len(tensor) for tensor in tensors), *shape))
    start = 0
    for tensor in tensors:
        place = joined[start : start + len(tensor)]
        place[tuple(slice(0, size) for size in tensor.shape)] = tensor
        start += len(tensor)
    return joined


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _row(values: Any) -> list[int]:
    return [int(value) for value in values[0]]


def _tensor(value: Any) -> torch.Tensor:
    """What image processors give without ``return_tensors``: a tensor, an array, or a list of either (maybe nested)."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
        parts = [_tensor(part) for part in value]
        return join_tensors([part.unsqueeze(0) for part in parts])
    return torch.as_tensor(value)
