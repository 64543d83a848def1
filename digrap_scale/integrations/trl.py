"""TRL's trainers on FSDP2: what their fused LM head needs.

TRL's ``SFTTrainer`` (1.16) computes the loss from ``lm_head.weight`` itself, past the module's forward. Where FSDP2 shards
the head as a module of its own (Accelerate's wrapping does), the whole weight is gathered by ``DTensor.full_tensor()``, whose
backward takes each rank's gradient for the sum over ranks: every rank steps its rows of the head by its own samples alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.fsdp2 import is_sharded_by_itself


def next_token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """The loss that a causal language model of transformers computes by itself, from its logits: for
    ``SFTTrainer(compute_loss_func=next_token_loss)``, which then calls the model as a whole.

    Args:
        outputs: the model's, with ``logits`` [B, T, V].
        labels: [B, T], int64; -100 counts nowhere.
        num_items_in_batch: tokens that count in the whole batch, of all ranks and micro-batches; None: those of ``labels``.
    """
    counted = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=counted)


def check_head(trainer: Trainer) -> None:
    """Raises: ConfigError where ``trainer`` would not sum the head's gradient over ranks."""
    of_trl = any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)
    if not of_trl or trainer.compute_loss_func is not None:
        return
    head: Any = getattr(trainer.model, "get_output_embeddings", lambda: None)()
    if head is not None and is_sharded_by_itself(head) and head.weight.requires_grad:
        raise ConfigError(
            f"DigrapCallback: {type(trainer).__name__} on FSDP2 does not sum the LM head's gradient over ranks (TRL's fused "
            "head, seen in 1.16); give it compute_loss_func=digrap_scale.integrations.trl.next_token_loss, or freeze the head"
        )
