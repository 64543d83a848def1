"""DeepSpeed ZeRO-3: every parameter is cut into equal pieces, one a rank; one optimizer step per sub-group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.base import nonfinite_names
from digrap_scale.sharding.zero import Place, ZeroBackend
from digrap_scale.types import ShardSpec


class Zero3Backend(ZeroBackend):
    """Views into the engine's fp32 partitions.

    DeepSpeed's public ``safe_get_local_*`` functions give copies for offloaded state and nothing for a sub-group whose
    gradient is being stepped, so the optimizer's own lists are read: ``fp16_groups`` (parameters per sub-group),
    ``fp32_partitioned_groups_flat``, ``averaged_gradients``, ``sub_group_to_group_id``. tests/sharding pin them against
    the public functions.

    Parameters below the persistence threshold stay whole for forward and backward, but their masters, gradients and
    state are cut like all others: nothing is counted twice.

    Raises:
        ConfigError: the engine trains nothing.
    """

    name = "zero3"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        for sub_group, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for position, parameter in enumerate(parameters):
                partition = parameter.partition_numel()
                self._group = parameter.ds_process_group
                rank = dist.get_rank(self._group)
                # Partitions are padded to one size with memory that was never written: real elements only.
                start = min(rank * partition, parameter.ds_numel)
                stop = min(start + partition, parameter.ds_numel)
                name = self._names[id(parameter)]
                self.specs.append(ShardSpec(name, tuple(parameter.ds_shape), start, stop))
                self._place.append(Place(sub_group, offset, position, stop - start))
                offset += partition
        if not self.specs:
            raise ConfigError("zero3: the engine's optimizer trains no parameter: nothing to attach to")

    @property
    def _flats(self) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats

    def _pending_gradient(self, layer: int) -> torch.Tensor | None:
        place = self._place[layer]
        grads = self._zero.averaged_gradients.get(place.flat)
        return None if grads is None else grads[place.position].view(-1).narrow(0, 0, place.real)

    def frozen(self, name: str, parameter: nn.Parameter) -> tuple[ShardSpec, torch.Tensor]:
        partition: Any = parameter
        size = partition.partition_numel()
        start = min(dist.get_rank(partition.ds_process_group) * size, partition.ds_numel)
        stop = min(start + size, partition.ds_numel)
        return ShardSpec(name, tuple(partition.ds_shape), start, stop), partition.ds_tensor.detach().view(-1)[
            : stop - start
        ]

    def weights_changed(self) -> None:
        zero = self._zero
        # What an evaluation's forward has gathered and kept is out of date; the optimizer's step begins with the same call.
        zero.parameter_offload.partition_all_parameters()
        for sub_group in range(len(self._flats)):
            # What its step and its own loading call; there is no public function. tests/distributed/test_resume.py needs it.
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if persistent := zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def group(self, layer: int) -> dict[str, Any]:
        number = self._zero.sub_group_to_group_id[self._place[layer].flat]
        group: dict[str, Any] = self._zero.optimizer.param_groups[number]
        return group

    def nonfinite_layers(self) -> list[str]:
        from deepspeed.utils import safe_get_local_grad

        local = nonfinite_names(
            (spec.name, safe_get_local_grad(self._zero.fp16_groups[place.flat][place.position]).view(-1)[: place.real])
            for spec, place in zip(self.specs, self._place, strict=True)
        )
        return self._on_any_rank(set(local))
