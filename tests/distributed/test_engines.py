"""The loop's engines on two ranks: what is wrapped, what precision keeps, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import ViTForImageClassification

from digrap_scale.config import Config
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.models.groups import build_groups
from digrap_scale.projector import attach
from digrap_scale.sharding.build import build_engine
from digrap_scale.sharding.fsdp2 import refuse_split_ties
from tests.distributed.ranks import run_ranks
from tests.distributed.toy import Block, make_toy
from tests.distributed.training_runs import allow_float16
from tests.models.tiny import make_config, save_clip, save_vit


def config_of(
    folder: str,
    backend: str,
    wrap: list[str],
    precision: str,
    freeze: list[str],
    more: dict[str, Any] | None = None,
) -> Config:
    config = make_config(folder, "classification", freeze=freeze)
    sharding = {"backend": backend, "wrap": wrap, "mixed_precision": precision, **(more or {})}
    return Config.model_validate({**config.model_dump(), "sharding": sharding})


def one_step(
    folder: str,
    backend: str,
    wrap: list[str],
    precision: str,
    freeze: list[str],
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build, wrap, attach to the pre-trained file, and take a step with rate 1e-3."""
    config = config_of(folder, backend, wrap, precision, freeze, more)
    built = build_model(config, 3)
    engine = build_engine(
        built.model,
        lambda model: torch.optim.AdamW(build_groups(model, config.optimizer)),
        config,
        torch.device("cpu"),
        dist.get_world_size(),
    )
    before = engine.full_state_dict()
    model, optimizer = engine.attached_to
    projector = attach(model, optimizer, method="digrap", reference=built.checkpoint_folder)
    torch.manual_seed(dist.get_rank())
    while projector.report.step == 0:  # the first loss scales of float16 overflow
        with engine.micro_step(last=True):
            pixels = engine.cast(torch.randn(2, 3, 16, 16))
            engine.backward(engine.model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss)
        engine.step()
    return {
        "before": {name: tensor.clone() for name, tensor in before.items()},
        "after": {name: tensor.clone() for name, tensor in engine.full_state_dict().items()},
        "conflict_rate": projector.report.conflict_rate,
        "grad_norm": projector.report.grad_norm,
    }


@pytest.mark.parametrize(
    "backend, wrap, precision",
    [
        ("fsdp2", [], "none"),
        ("fsdp2", ["ViTLayer", "ViTAttention"], "none"),
        ("fsdp2", [], "bfloat16"),
        ("zero3", [], "bfloat16"),
    ],
)
def test_engine(backend: str, wrap: list[str], precision: str, tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    pretrained = ViTForImageClassification.from_pretrained(folder).state_dict()
    frozen = "embeddings"
    first, _ = run_ranks(2, tmp_path / "ranks", one_step, str(folder), backend, wrap, precision, [frozen])
    assert set(first["before"]) == set(pretrained)
    for name, value in pretrained.items():
        assert torch.equal(first["before"][name], value), f"{name} does not start as the checkpoint has it"
        assert torch.equal(first["after"][name], value) == (frozen in name), name
    assert first["conflict_rate"] == 0, "d is 0 before the first step"
    assert first["grad_norm"] > 0


def accumulated_steps(folder: str, sharding: dict[str, Any]) -> dict[str, Any]:
    """Three steps of CLIP on eight fixed samples: micro-batches of one, on several ranks or in one process.

    CLIP has a 0-d weight, which FSDP2 cannot shard.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    config = make_config(folder, "contrastive")
    training = config.training.model_copy(update={"global_batch_samples": 8, "micro_batch_samples": 1})
    config = config.model_copy(update={"sharding": config.sharding.model_copy(update=sharding), "training": training})
    built = build_model(config, 3)

    def build(config: Config) -> Any:
        return build_engine(
            built.model,
            lambda model: torch.optim.AdamW(build_groups(model, config.optimizer), fused=True),
            config,
            torch.device("cpu"),
            ranks,
        )

    refused = ""
    if ranks > 1:
        try:
            build(config.model_copy(update={"sharding": config.sharding.model_copy(update={"replicas": 3})}))
        except ConfigError as error:
            refused = str(error)
    engine = build(config)
    model, optimizer = engine.attached_to
    reference = {name: torch.zeros(p.shape) for name, p in built.model.named_parameters()}
    projector = attach(model, optimizer, method="digrap", reference=reference, strength_lr=0.05)
    torch.manual_seed(5)
    pixels, text = torch.randn(8, 3, 16, 16), torch.randint(4, 11, (8, 8))
    norms = []
    for _ in range(3):
        engine.model.train()
        share = 8 // ranks
        for part in range(engine.accumulation_steps):
            one = slice(rank * share + part, rank * share + part + 1)
            with engine.micro_step(last=part == engine.accumulation_steps - 1):
                out = engine.model(pixel_values=pixels[one], input_ids=text, attention_mask=torch.ones_like(text))
                target = torch.arange(8)[one]
                engine.backward(torch.nn.functional.cross_entropy(out.logits_per_image, target))
        engine.step()
        norms.append(projector.report.grad_norm)
    return {
        "weights": {name: tensor.clone() for name, tensor in engine.full_state_dict().items()},
        "norms": norms,
        "strength": projector.strength(),
        "refused": refused,
        "steps": engine.accumulation_steps,
    }


def test_hybrid_engine_equals_one_process(tmp_path: Path) -> None:
    """Two copies of two shards, offloaded, all-reduced over copies in the last micro-batch alone."""
    folder = str(save_clip(tmp_path / "clip"))
    alone = accumulated_steps(folder, {"backend": "single"})
    sharding = {"backend": "fsdp2", "replicas": 2, "offload": "cpu"}
    ranks = run_ranks(4, tmp_path / "ranks", accumulated_steps, folder, sharding)
    assert (alone["steps"], ranks[0]["steps"]) == (8, 2)
    for got in ranks:
        assert got["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert got["strength"] == ranks[0]["strength"]
        assert got["refused"] == "sharding.replicas: expected a divisor of the number of processes (4), found 3"
    assert max(alone["strength"].values()) > 0
    for name, value in alone["weights"].items():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam blows up to full steps
        torch.testing.assert_close(
            ranks[0]["weights"][name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_tied_across_blocks_are_refused() -> None:
    """fully_shard would untie them without a word."""
    model = make_toy()
    refuse_split_ties(model, list(model.blocks))
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.raises(
        ConfigError, match=r"^sharding.wrap: blocks.0.up.weight and blocks.1.up.weight are one tied weight"
    ):
        refuse_split_ties(model, list(model.blocks))
    refuse_split_ties(model, [])
    model = make_toy()
    model.head.weight = model.blocks[0].down.weight
    with pytest.raises(ConfigError, match=r"blocks.0.down.weight and head.weight"):
        refuse_split_ties(model, list(model.blocks))
    model = make_toy()
    model.blocks = torch.nn.ModuleList([Block()] * 2)  # one module used twice is no tie between two
    refuse_split_ties(model, [model.blocks[0]])


# backend, precision, more of the sharding section
ZERO = [
    ("zero1", "bfloat16", {}),
    ("zero2", "none", {"offload": "cpu"}),
    ("zero2", "float16", {}),
    ("zero3", "float16", {"offload": "cpu", "zero": {"sub_group_elements": 500, "persistence_threshold_elements": 0}}),
]


def zero_steps(folder: str, freeze: list[str]) -> dict[str, Any]:
    allow_float16()
    results = {
        f"{backend}-{precision}": one_step(folder, backend, [], precision, freeze, more)
        for backend, precision, more in ZERO
    }
    return {**results, "scalars": {backend: scaled_step(backend) for backend in ("zero1", "zero2")}}


def test_zero_engines(tmp_path: Path) -> None:
    """Checkpoint values in the masters, whatever the weights are rounded to; frozen ones stay; all come out whole."""
    folder, frozen = save_vit(tmp_path / "vit"), "embeddings"
    pretrained = ViTForImageClassification.from_pretrained(folder).state_dict()
    first, second = run_ranks(2, tmp_path / "ranks", zero_steps, str(folder), [frozen])
    for backend, precision, _ in ZERO:
        got = first[f"{backend}-{precision}"]
        assert set(got["before"]) == set(got["after"]) == set(pretrained)
        for name, value in pretrained.items():
            assert torch.equal(got["before"][name], value), f"{name} does not start as the checkpoint has it"
            assert torch.equal(got["after"][name], value) == (frozen in name), name
        assert got["conflict_rate"] == 0 and 0 < got["grad_norm"] < 100
    scales = first["scalars"]["zero1"]
    assert first["scalars"] == second["scalars"] and first["scalars"]["zero2"] == scales
    assert scales[0] == 2.0 > scales[1] > scales[2]


def scaled_step(backend: str) -> list[float]:
    """A 0-d parameter (CLIP's logit_scale) before and after two steps, and whether it is 0-d still."""
    config = config_of("unused", backend, [], "none", [])
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.scale = torch.nn.Parameter(torch.tensor(2.0))
    engine = build_engine(
        model, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), config, torch.device("cpu"), dist.get_world_size()
    )
    projector = attach(engine.attached_to[0], None, method="digrap", reference="zero")
    seen = [float(engine.full_state_dict().get("scale", 2.0))]
    for _ in range(2):
        with engine.micro_step(last=True):
            engine.backward((engine.model(torch.ones(2, 3)).square().mean() + 1) * engine.model.module.scale)
        engine.step()
        assert engine.model.module.scale.ndim == 0
        seen.append(float(engine.model.module.scale.detach()))
    assert projector.backend.specs[-1].shape == () or projector.backend.specs[0].shape == ()
    return seen


def test_float16_where_the_device_has_none(tmp_path: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device computes in float16")
    config = config_of(str(save_vit(tmp_path / "vit")), "zero2", [], "float16", [])
    with pytest.raises(ConfigError, match="does not compute in float16; use bfloat16"):
        build_engine(torch.nn.Linear(2, 2), torch.optim.SGD, config, torch.device("cpu"), 1)
