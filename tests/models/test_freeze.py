"""Freezing, BatchNorm, adapters and parameter groups."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from digrap_scale.config.schema import LinearProbeMethod, LPFTMethod, ModelConfig, NoMethod, OptimizerConfig
from digrap_scale.errors import ConfigError
from digrap_scale.models.build import build_model
from digrap_scale.models.freeze import apply_freezing, freeze_batch_norm, freeze_body, head_parameters
from digrap_scale.models.groups import build_groups
from tests.models import tiny


def toy() -> nn.Module:
    return nn.ModuleDict({"tower": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "head": nn.Linear(3, 2)})


def settings(**values: object) -> ModelConfig:
    return ModelConfig.model_validate({"path": "x", "task": "classification", **values})


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, {"tower.0.weight", "tower.0.bias", "tower.1.weight", "tower.1.bias", "head.weight", "head.bias"}),
        ({"freeze": ["^tower"]}, {"head.weight", "head.bias"}),
        ({"train_only": ["^head", r"\.1\."]}, {"head.weight", "head.bias", "tower.1.weight", "tower.1.bias"}),
        ({"train_only": ["^head"], "freeze": ["bias$"]}, {"head.weight"}),
    ],
)
def test_what_is_left_to_train(options: dict, left: set[str]) -> None:
    model = toy()
    lines = apply_freezing(model, settings(**options))
    assert training(model) == left
    assert len(lines) == len(options.get("freeze", [])) + len(options.get("train_only", []))


def test_lines_tell_what_matched() -> None:
    assert apply_freezing(toy(), settings(freeze=["^head"])) == [
        "model.freeze '^head': 2 tensors: head.weight, head.bias"
    ]


def test_freezing_everything_or_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="leave no parameter"):
        apply_freezing(toy(), settings(freeze=["."]))
    model = toy()
    with pytest.raises(ConfigError) as error:
        apply_freezing(model, settings(freeze=["haed", "^tower", "nothing"]))
    assert len(error.value.problems) == 2
    assert "nearest: head." in error.value.problems[0]
    assert len(training(model)) == 6  # nothing half done


@pytest.mark.parametrize("wrapped", ["bare", "nested", "copied", "ddp"])
def test_batch_norm_statistics_stay(wrapped: str, tmp_path: Path) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    assert freeze_batch_norm(model) == 1
    norm = model[1]
    before = norm.running_mean.clone()
    if wrapped == "nested":
        model = nn.ModuleDict({"m": model})
    elif wrapped == "copied":
        model = copy.deepcopy(model)
        norm = model[1]
        assert norm.train() is norm
    elif wrapped == "ddp":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if wrapped == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        model.eval()
        model.train()
        run = model["m"] if wrapped == "nested" else model
        run(torch.randn(5, 3) + 4).sum().backward()
        assert not norm.training
        assert next(m for m in model.modules() if isinstance(m, nn.Dropout)).training
        assert torch.equal(norm.running_mean, before)
        assert norm.weight.grad is not None
    finally:
        if wrapped == "ddp":
            torch.distributed.destroy_process_group()


def test_built_models_freeze_batch_norm_unless_told(tmp_path: Path) -> None:
    tiny.save_resnet(tmp_path)
    for option, still in (("frozen", True), ("train", False)):
        built = build_model(tiny.make_config(tmp_path, "classification", batch_norm=option), 3)
        built.model.train()
        norms = [m for m in built.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.training != still for norm in norms)
        assert any("statistics of" in line for line in built.report) == still


def test_lora_trains_adapters_and_the_new_head(tmp_path: Path) -> None:
    tiny.save_vit(tmp_path)
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    names = dict(build_model(tiny.make_config(tmp_path, "classification"), 3).model.named_modules())
    lora["target_modules"] = sorted({n.rpartition(".")[2] for n in names if n.endswith(("query", "q_proj"))})
    assert lora["target_modules"]
    config = tiny.make_config(tmp_path, "classification", lora=lora, new_head=True, dtype="bfloat16")
    built = build_model(config, 4)
    left = training(built.model)
    assert left and all("lora_" in name or "modules_to_save.default" in name for name in left)
    assert built.new_parameters == {
        f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }
    assert built.new_parameters <= left
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.bfloat16}
    logits = built.model(pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).logits
    assert logits.shape == (2, 4)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["no_proj"]}, "model.lora.target_modules"),
        ({"target_modules": "no.*such"}, "model.lora.target_modules"),
        ({"target_modules": ".*layernorm_before"}, "model.lora.target_modules"),
        ({"target_modules": ["query", "q_proj"], "modules_to_save": ["clasifier"]}, "nearest: classifier"),
    ],
)
def test_lora_without_a_match_is_an_error(tmp_path: Path, lora: dict, message: str) -> None:
    tiny.save_vit(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_model(tiny.make_config(tmp_path, "classification", lora=lora), 3)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def optimizer(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 0.1, "weight_decay": 0.2, **values})


def test_first_matching_group_counts() -> None:
    model = toy()
    model["tower"][0].weight.requires_grad_(False)
    patterns = [{"pattern": "bias$", "weight_decay": 0.0}, {"pattern": "^head", "learning_rate": 0.0}]
    groups = build_groups(model, optimizer(groups=patterns))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [(g["name"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups] == [
        ("bias$", 0.1, 0.0, ["tower.0.bias", "tower.1.bias", "head.bias"]),
        ("^head", 0.0, 0.2, ["head.weight"]),
        ("default", 0.1, 0.2, ["tower.1.weight"]),
    ]
    torch.optim.AdamW(groups)


def test_an_empty_default_group_is_left_out() -> None:
    (group,) = build_groups(toy(), optimizer(groups=[{"pattern": "."}]))
    assert len(group["params"]) == 6


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["hed"], "'hed' matches no parameter; nearest: head."),
        (["^head", "head.bias"], "0 are frozen and 1 belong to an earlier group"),
        (["tower.0.weight"], "1 are frozen and 0 belong"),
    ],
)
def test_groups_without_parameters_are_errors(patterns: list[str], message: str) -> None:
    model = toy()
    model["tower"][0].weight.requires_grad_(False)
    with pytest.raises(ConfigError) as error:
        build_groups(model, optimizer(groups=[{"pattern": p} for p in patterns]))
    assert message in str(error.value)


def test_a_linear_probe_trains_the_head_alone() -> None:
    model = toy()
    head = head_parameters(model, LinearProbeMethod(head=["^head"]), ())
    assert head == {"head.weight", "head.bias"}
    assert freeze_body(model, LinearProbeMethod(), head) == ["method.head: 2 tensors: head.bias, head.weight"]
    assert training(model) == head


def test_the_head_is_what_starts_new_and_lp_ft_freezes_nothing() -> None:
    model, method = toy(), LPFTMethod(probe_steps=2)
    assert head_parameters(model, method, {"head.bias"}) == {"head.bias"} and freeze_body(model, method, {"head.bias"})
    assert len(training(model)) == 6 and head_parameters(model, NoMethod(), {"head.bias"}) == set()
    groups = build_groups(model, OptimizerConfig(learning_rate=0.1), {"head.bias"})
    assert [(group["name"], len(group["params"])) for group in groups] == [("default", 5), ("default (head)", 1)]


@pytest.mark.parametrize(
    ("head", "message"), [([], "nothing starts new"), (["haed"], "'haed' matches nothing that trains; nearest: head")]
)
def test_a_head_that_is_not_there(head: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.head: .*{message}"):
        head_parameters(toy(), LinearProbeMethod(head=head), ())
