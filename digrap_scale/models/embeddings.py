"""A sample's embeddings, out of the model's own forward pass: what the degree of shift is measured on.

One entry a kind of model. All of them call the wrapped model at its root and look at what passes through it, so that
sharded models gather their weights as they always do. Vectors are float32, [B, E].

- Generative: ``vision`` is the mean of the first hidden states at the image's tokens (the tower's features after the
  projector), ``question`` the mean of those at the tokens of words (the text's input embeddings, which have seen no image;
  what stands around images and tiles, whose number goes with an image's size, is not among them), ``joint`` the mean of the
  last hidden states over all tokens. So do the paper's authors, with PaliGemma.
- Classification: ``vision`` is what the classifier is given (Lee et al. 2018, arXiv 1807.03888).
- Contrastive: ``vision`` is the image's embedding; ``joint`` is that and its label's text embedding, one after the other.
"""

# B samples of a batch, T tokens, E embedding size

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.types import Batch

# name → ([B, E] vectors, [B] which of them count: no padding, and the sample has that part).
Embeddings = dict[str, tuple[torch.Tensor, torch.Tensor]]
Embed = Callable[[Any, Batch], Embeddings]
# Token ids [B, T] → bool [B, T], which of them are words: see ``Family.is_text``.
IsText = Callable[[torch.Tensor], torch.Tensor]


def build_embed(task: str, module: nn.Module, is_text: IsText | None = None) -> Embed:
    """``embed(model, batch)`` for a model of ``model.task``.

    Args:
        task: the config's ``model.task``.
        module: the model itself; ``embed`` is called with the wrapped one.
        is_text: of a generative model, which tokens are words of the question; None: all but the image's.

    Raises:
        ConfigError: nothing to take embeddings from in such a model.
    """
    base: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    return EMBED[task](base, is_text)


def _classification(module: nn.Module, _: IsText | None) -> Embed:
    head = getattr(module, "classifier", None)
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"evaluation.shift_degree: {type(module).__name__} has no `classifier` whose input could be taken; remove it"
        )

    def embed(model: Any, batch: Batch) -> Embeddings:
        seen: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(**batch.inputs)
        finally:
            handle.remove()
        return {"vision": (seen[0].flatten(1).float(), _real(batch))}

    return embed


def _contrastive(_: nn.Module, __: IsText | None) -> Embed:
    def embed(model: Any, batch: Batch) -> Embeddings:
        output = model(**batch.inputs)
        real_B = _real(batch)
        assert batch.labels is not None
        image_BE = output.image_embeds.float()
        label_BE = output.text_embeds.float()[batch.labels.clamp(min=0)]
        return {"vision": (image_BE, real_B), "joint": (torch.cat([image_BE, label_BE], dim=1), real_B)}

    return embed


def _generative(module: nn.Module, is_text: IsText | None) -> Embed:
    token = getattr(module.config, "image_token_id", None)
    if token is None:
        raise ConfigError(
            f"evaluation.shift_degree: {type(module).__name__}'s config has no image_token_id to tell images by; remove it"
        )

    def embed(model: Any, batch: Batch) -> Embeddings:
        states = model(**batch.inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        real_B = _real(batch)
        rows = len(real_B)  # a blank row may follow the samples
        ids_BT = batch.inputs["input_ids"][:rows]
        token_BT = batch.inputs["attention_mask"][:rows].bool()
        image_BT = token_BT & (ids_BT == token)
        words_BT = token_BT & ~image_BT
        if is_text is not None:
            words_BT &= is_text(ids_BT)
        first_BTE, last_BTE = states[0][:rows].float(), states[-1][:rows].float()

        def mean(states_BTE: torch.Tensor, of_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            count_B = of_BT.sum(dim=1)
            total_BE = torch.einsum("bte,bt->be", states_BTE, of_BT.float())
            return total_BE / count_B.clamp(min=1)[:, None], real_B & (count_B > 0)

        return {
            "vision": mean(first_BTE, image_BT),
            "question": mean(first_BTE, words_BT),
            "joint": mean(last_BTE, token_BT),
        }

    return embed


def _real(batch: Batch) -> torch.Tensor:
    """[B] bool: samples that are not padding."""
    assert batch.labels is not None, "evaluation batches have labels"
    return batch.labels != -1


EMBED: dict[str, Callable[[nn.Module, IsText | None], Embed]] = {
    "classification": _classification,
    "contrastive": _contrastive,
    "vqa": _generative,
    "classification-as-vqa": _generative,
}
