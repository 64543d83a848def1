"""Visual question answering with a generative model: free-form answers, maybe of several annotators."""

# B samples of a batch, R rows (a sample each, or several, and maybe a blank one), T tokens, K positions whose logits are
# asked for

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig

from digrap_scale.data.tasks.base import Task, text_field, texts_field
from digrap_scale.errors import ConfigError
from digrap_scale.types import IGNORED, Batch

# The engine's generation: (model inputs, settings) → [R, prompt and new tokens].
Generate = Callable[[dict[str, torch.Tensor], GenerationConfig], torch.Tensor]


class Encoder(Protocol):
    """What the task needs of a model's family: see ``models.families``."""

    limit: int | None
    pad_id: int
    end_ids: list[int]
    keeps_logits: bool

    def encode(self, question: str, images: Sequence[Any], answer: str | None = None) -> Any: ...

    def continuation(self, question: str, images: int, answer: str) -> dict[str, list[int]]: ...

    def join(self, rows: Sequence[Any], *, left: bool) -> dict[str, torch.Tensor]: ...

    def pack(self, rows: Sequence[Any], row_tokens: int) -> dict[str, torch.Tensor]: ...

    def computed_tokens(self, rows: Sequence[Any], row_tokens: int | None) -> int: ...

    def supervised(self, rows: Sequence[Any], width: int) -> torch.Tensor: ...

    def is_text(self, ids: torch.Tensor) -> torch.Tensor: ...

    def decode(self, ids_BT: torch.Tensor) -> list[str]: ...


class VqaTask(Task):
    """Answers a question about a sample's images.

    Training: cross entropy of the answer's tokens and its end. A sample's loss is the mean over its tokens, the batch's
    the mean over samples, so that neither padding nor the split over ranks weighs in. Evaluation: generated texts.
    """

    generates = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        train: bool,
        prompt: str,
        question_field: str = "question",
        answers_field: str = "answers",
        answer_choice: str,
        max_tokens: int | None,
        generation: dict[str, Any],
        pack_tokens: int | None = None,
        max_forward_tokens: int | None = None,
        max_forward_images: int | None = None,
        **common: Any,
    ) -> None:
        """
        Args:
            encoder: the model's family.
            train: whether batches carry supervised answers, or end where generation begins.
            prompt: text with ``{question}`` in it.
            question_field, answers_field: keys of a sample's JSON.
            answer_choice: ``most_frequent`` (the first of equals) or ``random`` (drawn anew in each epoch, by seed).
            max_tokens: the longest sample; None: what the model has positions for.
            generation: settings of ``transformers.GenerationConfig``.
            pack_tokens: in training, samples share rows of up to so many tokens; None: a row a sample.
            max_forward_tokens: in training, most tokens of a forward, padding included; None: any number.
            max_forward_images: in training, most images of a forward; None: any number.
        """
        super().__init__(None, **common)
        self.encoder = encoder
        self.train = train
        self.prompt = prompt
        self.question_field, self.answers_field = question_field, answers_field
        self.answer_choice = answer_choice
        self.pack_tokens = pack_tokens if train else None
        self.max_forward_tokens = max_forward_tokens if train else None
        self.max_forward_images = max_forward_images if train else None
        limits = (max_tokens, encoder.limit, self.pack_tokens)
        self.max_tokens = min((n for n in limits if n is not None), default=None)
        # Everything that shapes the output is stated: a checkpoint's own generation config may sample, or punish repetition.
        self.generation = GenerationConfig(
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=encoder.end_ids,
            pad_token_id=encoder.pad_id,
            **generation,
        )

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Token fields [R, T], the images' tensors, in training ``labels`` [R, T]; ``Batch.labels`` [B] are 0 for each sample.
        Packed also ``sample_ids`` [R, T], the sample that a token belongs to (−1: none).

        Padding is on the right in training, on the left where generation goes on.
        """
        return self._joined(samples, *self._rows(samples))

    def micro_batch(self, samples: list[dict[str, Any]]) -> Batch:
        """``collate``, cut into as many consecutive parts as the budgets for a forward ask for."""
        answers, rows = self._rows(samples)
        first, *rest = [self._joined(samples[part], answers[part], rows[part]) for part in self._parts(samples, rows)]
        return replace(first, rest=rest)

    def _rows(self, samples: list[dict[str, Any]]) -> tuple[list[list[str]], list[Any]]:
        """All annotators' answers to each sample, and each sample encoded."""
        answers = [self.answers(sample) for sample in samples]
        return answers, [self._encoded(sample, one) for sample, one in zip(samples, answers, strict=True)]

    def _parts(self, samples: list[dict[str, Any]], rows: list[Any]) -> list[slice]:
        """Each as long as its forward keeps to the budgets. Raises: ConfigError: a sample does not by itself."""
        parts: list[slice] = []
        start = 0
        for number, sample in enumerate(samples):
            if self._fits(samples[start : number + 1], rows[start : number + 1]):
                continue
            if not self._fits([sample], [rows[number]]):
                tokens = self.encoder.computed_tokens([rows[number]], self.pack_tokens)
                raise ConfigError(
                    f"{sample['shard']}: sample {sample['key']}: a forward of it alone has {tokens} tokens and "
                    f"{len(sample['images'])} image(s), data.max_forward_tokens is {self.max_forward_tokens}, "
                    f"data.max_forward_images {self.max_forward_images}; raise them, or leave the sample out"
                )
            parts.append(slice(start, number))
            start = number
        return [*parts, slice(start, len(samples))]

    def _fits(self, samples: list[dict[str, Any]], rows: list[Any]) -> bool:
        images = sum(len(sample["images"]) for sample in samples)
        if self.max_forward_images is not None and images > self.max_forward_images:
            return False
        if self.max_forward_tokens is None:
            return True
        return self.encoder.computed_tokens(rows, self.pack_tokens) <= self.max_forward_tokens

    def _joined(self, samples: list[dict[str, Any]], answers: list[list[str]], rows: list[Any]) -> Batch:
        if self.pack_tokens is not None:
            inputs = self.encoder.pack(rows, self.pack_tokens)
        else:
            inputs = self.encoder.join(rows, left=self.generates and not self.train)
        inputs = {name: self._cast(tensor) for name, tensor in inputs.items()}
        if self.train and self.pack_tokens is None:
            height, width = inputs["input_ids"].shape
            labels = torch.full((height, width), IGNORED, dtype=torch.int64)
            labels[: len(rows)] = self.encoder.supervised(rows, width)
            inputs["labels"] = labels
        return Batch(
            inputs,
            self.labels(samples),
            [sample["key"] for sample in samples],
            answers,
            [self.group(sample) for sample in samples],
        )

    def emptied(self, batch: Batch) -> Batch:
        """See ``Task.emptied``; no token is supervised."""
        batch = super().emptied(batch)
        if self.train:
            batch.inputs = {**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], IGNORED)}
        return batch

    def labels(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """[B] zeros: every sample counts."""
        return torch.zeros(len(samples), dtype=torch.int64)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def question(self, sample: dict[str, Any]) -> str:
        """The user's text."""
        return self.prompt.replace("{question}", text_field(sample, self.question_field, "data.question_field"))

    def answers(self, sample: dict[str, Any]) -> list[str]:
        """All annotators' answers."""
        return texts_field(sample, self.answers_field, "data.answers_field")

    def group(self, sample: dict[str, Any]) -> str:
        """By what scores are told apart: the sample's ``question_type``, else its ``answer_type``, else nothing."""
        meta = sample["meta"]
        return str(meta.get("question_type") or meta.get("answer_type") or "")

    def target(self, sample: dict[str, Any], answers: Sequence[str]) -> str:
        """The answer that is trained on; never a blank one."""
        answers = [answer for answer in answers if answer.strip()]
        if self.answer_choice == "random":
            return random.Random(f"answer/{sample['seed']}").choice(answers)
        return Counter(answers).most_common(1)[0][0]

    def images(self, sample: dict[str, Any]) -> list[Any]:
        """The sample's images as the model sees them."""
        return list(sample["images"])

    def _encoded(self, sample: dict[str, Any], answers: Sequence[str]) -> Any:
        images = self.images(sample)
        try:
            row = self.encoder.encode(
                self.question(sample), images, self.target(sample, answers) if self.train else None
            )
        except (ValueError, IndexError, TypeError) as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"{sample['shard']}: sample {sample['key']}: the processor failed: {line}") from error
        room = 0 if self.train else self.generation.max_new_tokens
        if self.max_tokens is not None and len(row) + room > self.max_tokens:
            made = f"{len(row)} tokens" + (f" and up to {room} new ones" if room else "")
            raise ConfigError(
                f"{sample['shard']}: sample {sample['key']}: {made} with {len(images)} image(s), limit {self.max_tokens}; "
                "nothing is cut off, for it could be an image's tokens: raise data.max_tokens or data.pack_tokens if the model "
                "has the positions, shorten the text, or make images smaller"
            )
        return row

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean over samples of the mean cross entropy of a sample's supervised tokens."""
        inputs = dict(batch.inputs)
        labels_RT, owners_RT = inputs.pop("labels"), inputs.pop("sample_ids", None)
        if owners_RT is None:
            likelihood_B, tokens_B = self.log_likelihood(model, inputs, labels_RT)
            counted_B = tokens_B > 0
            return -(likelihood_B / tokens_B.clamp(min=1)).sum() / counted_B.sum().clamp(min=1)
        # Without a cache: with one, transformers does not look for several samples in a row.
        likelihood_RK, columns_K = self._token_likelihoods(model, {**inputs, "use_cache": False}, labels_RT)
        supervised_RK = (labels_RT[:, 1:][:, columns_K] != IGNORED).long()
        owners_RK = owners_RT[:, 1:][:, columns_K].clamp(min=0)  # nobody's tokens count 0
        assert batch.labels is not None
        tokens_B = torch.zeros_like(batch.labels).index_add(0, owners_RK.flatten(), supervised_RK.flatten())
        likelihood_RK = likelihood_RK / tokens_B.clamp(min=1)[owners_RK]
        return -likelihood_RK.sum() / (tokens_B > 0).sum().clamp(min=1)

    def log_likelihood(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], labels_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ log p of each row's supervised tokens (labels other than −100), and how many they are: [R] float32, [R] int64.

        Logits at t tell of the label at t + 1. Where the model can, only the columns are computed in which some row is
        supervised: of a long prompt and a large vocabulary, most of the memory.
        """
        likelihood_RK, columns_K = self._token_likelihoods(model, inputs, labels_RT)
        return likelihood_RK.sum(dim=1), (labels_RT[:, 1:][:, columns_K] != IGNORED).sum(dim=1)

    def _token_likelihoods(
        self, model: nn.Module, inputs: dict[str, Any], labels_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of the supervised tokens, 0 at others: [R, K] float32, and the columns [K] of the tokens that tell of them."""
        targets_RT = labels_RT[:, 1:]
        columns_K = (targets_RT != IGNORED).any(dim=0).nonzero()[:, 0]
        if self.encoder.keeps_logits:
            logits_RKV = model(**inputs, logits_to_keep=columns_K).logits
        else:
            logits_RKV = model(**inputs).logits[:, columns_K]
        targets_RK = targets_RT[:, columns_K]
        losses_RK = functional.cross_entropy(
            logits_RKV.float().transpose(1, 2), targets_RK, ignore_index=IGNORED, reduction="none"
        )
        return -losses_RK, columns_K

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        raise AssertionError("answers are generated, not told apart")

    def predict(self, generate: Generate, batch: Batch) -> list[str]:
        """The model's answer to each sample (padding included)."""
        assert batch.labels is not None
        sequences = generate(batch.inputs, self.generation)
        prompt_tokens = batch.inputs["input_ids"].shape[1]
        return self.encoder.decode(sequences[: len(batch.labels), prompt_tokens:].cpu())
