"""The toy model under ``fully_shard``, in the ways that people use it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.toy import Toy


def shard_toy(
    model: Toy,
    *,
    bfloat16: bool = False,
    replicas: int = 1,
    offload: bool = False,
    reshard: bool = True,
    whole: tuple[str, ...] = (),
    reduce_float32: bool = False,
) -> None:
    """Shard ``model`` in place.

    Args:
        bfloat16: compute in it, with float32 masters.
        replicas: copies of the sharded model (HSDP).
        offload: keep shards on the CPU.
        reshard: free full weights after forward.
        whole: modules of the root that are left unsharded.
        reduce_float32: sum gradients in float32 where they are computed in bfloat16.
    """
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32 if reduce_float32 else None
    )
    ignored = {parameter for name in whole for parameter in model.get_submodule(name).parameters()}
    for module in (*model.blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
            reshard_after_forward=reshard,
            ignored_params=ignored,
        )


def set_sync(model: torch.nn.Module, how: str, last: bool) -> None:
    """Before a micro-batch's backward: reduce in ``every`` one, in the ``last`` alone, or ``replicas`` in the last alone."""
    assert isinstance(model, FSDPModule)
    if how == "last":
        model.set_requires_gradient_sync(last)
    elif how == "replicas":
        model.set_requires_all_reduce(last)
    else:
        assert how == "every", how


def average_whole(model: torch.nn.Module) -> None:
    """What is left unsharded is the user's to average over ranks."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
