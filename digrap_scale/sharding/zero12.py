"""DeepSpeed ZeRO-1 and ZeRO-2: each parameter group is one flat buffer, of which every rank steps one contiguous part.

A part begins and ends anywhere: a parameter may lie on several ranks, or on one. The last part ends in padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import nonfinite_names
from digrap_scale.sharding.zero import Place, ZeroBackend
from digrap_scale.types import ShardSpec


class Zero12Backend(ZeroBackend):
    """Views into the engine's ``single_partition_of_fp32_groups``.

    The public ``param._hp_mapping`` says where a parameter's fragment is, but not with ``round_robin_gradients``, which
    reorders the buffer behind its back; and it has no gradient once the group is stepped. So the optimizer's own lists
    are read: ``bit16_groups`` (parameters per group), ``bit16_groups_flat`` (whose views the model's weights are),
    ``single_partition_of_fp32_groups``, ``averaged_gradients``. tests/sharding pin them against the public functions.

    ``_update_scale`` is wrapped, on the engine's optimizer alone: DeepSpeed calls it once a step, when all gradients are
    complete and nothing is freed yet. An overflow's layers are known only there, the loss scale that the norm was
    measured with, too, and all parameter groups (the inner optimizer shows its hooks one of them).

    Raises:
        ConfigError: the engine trains nothing, or its weights are elsewhere (``offload_states``).
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.name = f"zero{engine.zero_optimization_stage()}"
        self._nonfinite: set[str] = set()
        self._fragments: dict[int, dict[int, int]] = {}  # of each group: offset in the partition → number in its list
        self._groups: list[dict[str, Any]] = list(self._zero.optimizer.param_groups)
        self._scale_of_norm = 1.0
        self._group = self._zero.dp_process_group
        rank = dist.get_rank(self._group)
        for number, (parameters, buffer) in enumerate(zip(*self._buffers(), strict=True)):
            partition = self._flats[number].numel()
            for position, parameter in enumerate(parameters):
                name = self._names[id(parameter)]
                if parameter.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                    raise ConfigError(f"{self.name}: {name} is not in the engine's buffer; call reload_states() first")
                # A parameter's interval of the buffer, cut to this rank's, in the parameter's own numbering.
                begin = int(parameter.storage_offset() - buffer.storage_offset())
                start = min(max(rank * partition - begin, 0), parameter.numel())
                stop = min(max((rank + 1) * partition - begin, start), parameter.numel())
                self.specs.append(ShardSpec(name, tuple(parameter.shape), start, stop))
                offset = begin + start - rank * partition if stop > start else 0
                self._place.append(Place(number, offset, position, stop - start))
        if not self.specs:
            raise ConfigError(f"{self.name}: the engine's optimizer trains no parameter: nothing to attach to")
        self._watch()

    def _buffers(self) -> tuple[list[list[torch.nn.Parameter]], list[torch.Tensor]]:
        """Of every group, its parameters and the flat buffer that they are views of."""
        return self._zero.bit16_groups, self._zero.bit16_groups_flat

    def _watch(self) -> None:
        zero = self._zero
        original = zero._update_scale  # maybe another backend's wrapper: all of them are called

        def before_update(has_overflow: bool = False) -> None:
            self._groups = list(zero.optimizer.param_groups)
            self._scale_of_norm = float(zero.loss_scale)
            if has_overflow:
                self._nonfinite = set(nonfinite_names(self._complete_gradients()))
            original(has_overflow)

        zero._update_scale = before_update

    def weights_changed(self) -> None:
        self._zero.update_lp_params()  # as DeepSpeed's own loading does

    def _complete_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for layer, (spec, place) in enumerate(zip(self.specs, self._place, strict=True)):
            grad = self._flats[place.flat].grad
            if grad is not None:
                yield spec.name, grad.narrow(0, place.offset, place.real)
            else:
                yield spec.name, self._pending_gradient(layer)

    @property
    def _flats(self) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self._zero.single_partition_of_fp32_groups
        return flats

    def _pending_gradient(self, layer: int) -> torch.Tensor | None:
        place = self._place[layer]
        grads = self._zero.averaged_gradients.get(place.flat)
        if grads is None:
            return None
        whole = getattr(grads, "flat_partition", None)  # float32 accumulation of half-precision gradients
        if whole is not None:
            return whole.narrow(0, place.offset, place.real)
        if place.real == 0:
            return self._flats[place.flat].new_empty(0)
        # Otherwise a list of fragments that tile the partition in order, padding included.
        if place.flat not in self._fragments:
            starts = accumulate((fragment.numel() for fragment in grads), initial=0)
            numbered = zip(starts, enumerate(grads), strict=False)
            self._fragments[place.flat] = {start: i for start, (i, fragment) in numbered if fragment.numel()}
        fragment = grads[self._fragments[place.flat][place.offset]]
        assert fragment.numel() == place.real, f"{self.specs[layer].name}: its gradient is cut otherwise"
        flat: torch.Tensor = fragment.reshape(-1)
        return flat

    def group(self, layer: int) -> dict[str, Any]:
        current = self._zero.optimizer.param_groups
        if len(current) == len(self._flats):
            self._groups = list(current)
        return self._groups[self._place[layer].flat]

    def _scaled_norm(self) -> float:
        # The scale may have grown since the norm was measured.
        return float(self._zero._global_grad_norm) * self._scale_of_norm

    def nonfinite_layers(self) -> list[str]:
        return self._on_any_rank(self._nonfinite)


class Bf16Backend(Zero12Backend):
    """Stage 1 in bfloat16 with float32 accumulation: DeepSpeed's BF16_Optimizer.

    One optimizer step for all groups, with gradients that are clipped; every rank accumulates all of them.
    """

    def _buffers(self) -> tuple[list[list[torch.nn.Parameter]], list[torch.Tensor]]:
        return self._zero.bf16_groups, self._zero.bf16_groups_flat

    @property
    def _flats(self) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self._zero.fp32_groups_flat_partition
        return flats

    def _watch(self) -> None:
        zero = self._zero
        original = zero.clear_hp_grads

        # An overflow's gradients are cleared before the engine's step returns.
        def before_clearing() -> None:
            if zero.overflow:
                self._nonfinite = set(nonfinite_names(self._complete_gradients()))
            original()

        zero.clear_hp_grads = before_clearing

    def _complete_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for layer, spec in enumerate(self.specs):
            yield spec.name, self._pending_gradient(layer)

    def _pending_gradient(self, layer: int) -> torch.Tensor | None:
        place = self._place[layer]
        gradients: list[torch.Tensor] = self._zero.fp32_groups_gradient_flat_partition
        return gradients[place.flat].narrow(0, place.offset, place.real)

    def _pending_scale(self) -> float:
        return 1.0
