"""Real checkpoints of DeepSpeed engines and FSDP2, and real engines that load converted ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed.vlm_models import make_vlm

TAG = "global_step2"
CASES = [(stage, precision) for stage in (1, 2, 3) for precision in ("float32", "bfloat16")]


class Mixed(nn.Module):
    """What formats get wrong: tied, frozen, one-element and (where DeepSpeed takes them) empty parameters, buffers."""

    def __init__(self, stage: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.arange(5.0) / 3)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)
        if stage < 3:
            self.empty = nn.Parameter(torch.zeros(0, 5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.embedding(words)) + self.shift.to(self.scale.dtype)
        return self.head(self.frozen(hidden) * self.scale)


def make_engine(model: nn.Module, stage: int, precision: str, sub_group_elements: int = 10**9) -> Any:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "lr": 1e-3, "weight_decay": 0.0},
    ]
    config = {
        "train_batch_size": 4 * dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **({"sub_group_size": sub_group_elements} if stage == 3 else {})},
        "steps_per_print": 2**31,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    return deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=config, dist_init_required=False
    )[0]


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter (float32 masters of trained ones) and persistent buffer, as the engine itself gathers them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.numel() + getattr(parameter, "ds_numel", 0):
            weights[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights[name] = parameter.detach().clone()
    saved = set(engine.module.state_dict())
    weights.update({name: buffer.clone() for name, buffer in engine.module.named_buffers() if name in saved})
    return {name: weight.view(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}


def save_engines(folder: str, cases: list[tuple[int, str]]) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps and a save of each kind of engine: folder/zeroS-PRECISION."""
    expected = {}
    for stage, precision in cases:
        torch.manual_seed(0)
        engine = make_engine(Mixed(stage), stage, precision, sub_group_elements=12)
        for step in range(2):
            words = torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            engine.backward(nn.functional.cross_entropy(engine(words).float(), words))
            engine.step()
        name = f"zero{stage}-{precision}"
        engine.save_checkpoint(f"{folder}/{name}", tag=TAG)
        expected[name] = whole_weights(engine)
    return expected


def save_dcp(folder: str) -> dict[str, torch.Tensor]:
    """FSDP2's shards, some of them empty, beside a tensor that is cut along its second dim, and an optimizer's part."""
    torch.manual_seed(0)
    model = Mixed()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    columns = torch.arange(5 * 7.0).view(5, 7)
    state = {**get_model_state_dict(model), "columns": distribute_tensor(columns, mesh, [Shard(1)])}
    dcp.save({"model": state, "optim": {"step": torch.tensor(3), "lr": 0.1}}, checkpoint_id=folder)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {**full, "columns": columns}


def save_all(folder: str, cases: list[tuple[int, str]]) -> dict[str, dict[str, torch.Tensor]]:
    return {**save_engines(folder, cases), "dcp": save_dcp(f"{folder}/dcp")}


def load_all(folders: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Converted ZeRO-3 folders, loaded by DeepSpeed into fresh engines of other weights."""
    loaded = {}
    for name, folder in folders.items():
        kind, precision = name.split("-")
        torch.manual_seed(99)
        model = Mixed(3) if kind == "mixed" else make_vlm(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        engine = make_engine(model, 3, precision)
        engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
        loaded[name] = whole_weights(engine)
        with_optimizer = "loaded"
        try:
            engine.load_checkpoint(folder)
        except RuntimeError as error:
            with_optimizer = str(error)
        assert "Missing key" in with_optimizer, with_optimizer
    return loaded
