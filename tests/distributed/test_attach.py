"""``attach`` in one process, as users call it: what it accepts, refuses, reports, and leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

import digrap_scale
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.method import L2SP, DiGraP, DiGraPUpdate
from tests.distributed.toy import Toy, make_batches, make_theta0, make_toy

BATCHES = make_batches(12, 8)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = len(BATCHES), start: int = 0) -> None:
    for x, y in BATCHES[start : start + steps]:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(
    optimizer_of: Callable[..., Any] = adamw, **options: Any
) -> tuple[dict[str, torch.Tensor], digrap_scale.Projector]:
    model = make_toy()
    optimizer = optimizer_of(model)
    projector = digrap_scale.attach(model, optimizer, **{"reference": make_theta0(model), **options})
    train(model, optimizer)
    return weights(model), projector


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# What it accepts.


@pytest.mark.parametrize(
    ("name", "options", "instance"),
    [
        ("digrap", {"strength_lr": 0.05}, lambda: DiGraP(0.05)),
        ("digrap_update", {"strength_lr": 0.05}, lambda: DiGraPUpdate(0.05)),
        ("l2sp", {"weight": 0.1}, lambda: L2SP(0.1)),
    ],
)
def test_name_and_instance_are_the_same(name: str, options: dict, instance: Callable[[], Any]) -> None:
    by_name, _ = run(method=name, **options)
    by_instance, _ = run(method=instance())
    assert same(by_name, by_instance)


def test_reference_placement() -> None:
    there, _ = run(strength_lr=0.05)
    cpu, projector = run(strength_lr=0.05, reference_placement="cpu")
    assert same(there, cpu) and max(projector.strength().values()) > 0


def test_initial_is_a_copy_of_the_weights() -> None:
    model = make_toy()
    start = weights(model)
    initial, projector = run(reference="initial", strength_lr=0.05)
    mapping, _ = run(reference=start, strength_lr=0.05)
    assert same(initial, mapping) and len(projector.strength()) == sum(p.requires_grad for p in model.parameters())


def test_a_mapping_leaves_out_what_it_does_not_name() -> None:
    theta0 = make_theta0(make_toy())
    del theta0["blocks.0.gain"]
    _, projector = run(reference={**theta0, "not.ours": torch.zeros(3)})
    assert set(projector.strength()) == set(theta0)


def test_zero() -> None:
    model = make_toy()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    as_word, projector = run(reference="zero", strength_lr=0.05)
    as_tensors, _ = run(reference=zeros, strength_lr=0.05)
    assert (
        same(as_word, as_tensors)
        and not projector.held_tensors()
        and projector._reference.slices_L == [None] * len(zeros)
    )


@pytest.mark.parametrize("kind", ["file", "folder", "str"])
def test_path(tmp_path: Path, kind: str) -> None:
    theta0 = make_theta0(make_toy())
    save_file(theta0, tmp_path / "model.safetensors")
    path: Any = {"file": tmp_path / "model.safetensors", "folder": tmp_path, "str": str(tmp_path)}[kind]
    from_file, _ = run(reference=path, not_projected=["^head"], strength_lr=0.05)
    from_mapping, _ = run(reference=theta0, strength_lr=0.05)
    assert same(from_file, from_mapping)


def test_reference_is_not_the_callers_memory() -> None:
    model, theta0 = make_toy(), make_theta0(make_toy())
    optimizer = adamw(model)
    digrap_scale.attach(model, optimizer, reference=theta0, strength_lr=0.05)
    for tensor in theta0.values():
        tensor.fill_(9.0)
    train(model, optimizer)
    assert same(weights(model), run(strength_lr=0.05)[0])


def test_compiled_model_has_plain_names() -> None:
    model = make_toy()
    compiled = torch.compile(model, backend="eager")
    projector = digrap_scale.attach(compiled, sgd(compiled), reference=make_theta0(model))
    assert set(projector.strength()) == set(make_theta0(model))


# LoRA.


def make_lora(tmp_path: Path | None = None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_toy(), LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))


def test_adapters_default_to_zero() -> None:
    """No reference given, none read: d = θ for the adapters, and the frozen base is not there at all."""
    model = make_lora()
    projector = digrap_scale.attach(model, sgd(model), strength_lr=0.1)
    train(model, projector.backend.hooked[0])
    assert len(projector.strength()) == 8 and all("lora_" in name for name in projector.strength())
    assert projector._reference.slices_L == [None] * 8 and max(projector.strength().values()) > 0

    explicit = make_lora()
    other = digrap_scale.attach(explicit, sgd(explicit), strength_lr=0.1, reference="zero")
    train(explicit, other.backend.hooked[0])
    assert same(weights(model), weights(explicit))


def test_adapters_ignore_a_base_reference(tmp_path: Path) -> None:
    """A path for the base is not even opened when only adapters train."""
    model = make_lora()
    projector = digrap_scale.attach(model, sgd(model), reference=tmp_path / "absent.safetensors")
    assert projector._reference.slices_L == [None] * 8


def test_adapters_may_look_back_at_their_start() -> None:
    model = make_lora()
    projector = digrap_scale.attach(model, sgd(model), reference="initial")
    assert all(
        torch.equal(r.view_as(p), p)
        for r, (_, p, _) in zip(projector._reference.slices_L, projector.backend._trained, strict=True)
    )


# Clipping, accumulation, other optimizers, other loops.


@pytest.mark.parametrize("method", ["none", "digrap", "digrap_update"])
@pytest.mark.parametrize("optimizer_of", [sgd, adamw])
def test_max_grad_norm_is_torchs_clipping(method: str, optimizer_of: Callable[..., Any]) -> None:
    options = {} if method == "none" else {"strength_lr": 0.05}
    inside, projector = run(optimizer_of, method=method, max_grad_norm=0.3, **options)

    model = make_toy()
    optimizer = optimizer_of(model)
    outside = digrap_scale.attach(model, optimizer, method=method, reference=make_theta0(model), **options)
    norms = []
    for x, y in BATCHES:
        cross_entropy(model(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
        assert outside.report.grad_norm <= 0.3 * (1 + 1e-5), "the report is of the gradient that the hook was given"
    assert max(norms) > 0.6 and min(norms) < 0.3 or min(norms) > 0.3
    assert projector.report.grad_norm == pytest.approx(norms[-1], rel=1e-5)
    for name, weight in weights(model).items():
        torch.testing.assert_close(inside[name], weight, atol=2e-6, rtol=0)


def test_accumulation_with_the_users_own_clipping() -> None:
    """Two half batches are one batch."""
    whole, _ = run(max_grad_norm=0.3, strength_lr=0.05)
    model = make_toy()
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
    for x, y in BATCHES:
        for part in range(2):
            half = slice(part * 4, part * 4 + 4)
            (cross_entropy(model(x[half]), y[half]) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert projector.report.step == len(BATCHES)
    for name, weight in weights(model).items():
        torch.testing.assert_close(whole[name], weight, atol=5e-6, rtol=0)


@pytest.mark.parametrize("method", ["none", "digrap"])
def test_plain_until_the_strength_moves(method: str) -> None:
    """No method, or ω so slow that it never leaves float32's rounding of the first step: AdamW, bit for bit."""
    options = {} if method == "none" else {"strength_lr": 1e-30}
    model = make_toy()
    optimizer = adamw(model)
    train(model, optimizer, steps=1)
    ours = make_toy()
    optimizer = adamw(ours)
    projector = digrap_scale.attach(ours, optimizer, method=method, reference=make_theta0(ours), **options)
    train(ours, optimizer, steps=1)
    assert same(weights(model), weights(ours)) and projector.report.step == 1


@pytest.mark.parametrize("method", ["digrap", "digrap_update", "spd"])
def test_detach_restores_plain_training(method: str) -> None:
    options = {"weight": 0.5} if method == "spd" else {"strength_lr": 0.05}
    model = make_toy()
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, method=method, reference=make_theta0(model), **options)
    train(model, optimizer, steps=6)
    plain = make_toy()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = adamw(plain)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares tensors
    projector.detach()
    seen = projector.report.step
    train(model, optimizer, steps=6, start=6)
    train(plain, plain_optimizer, steps=6, start=6)
    assert same(weights(model), weights(plain)) and projector.report.step == seen
    projector.detach()  # twice is as good as once
    digrap_scale.attach(model, optimizer, method=method, reference="initial", **options)


def test_a_closure_is_evaluated_before_the_projection() -> None:
    """``optimizer.step(closure)``, as Lightning calls it: the gradient is there only once the closure has run."""
    runs = []
    for with_closure in (False, True):
        model = make_toy()
        optimizer = adamw(model)
        projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
        calls = 0

        def evaluate(x: torch.Tensor, y: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        for x, y in BATCHES:
            if with_closure:
                assert optimizer.step(lambda x=x, y=y, evaluate=evaluate: evaluate(x, y)).requires_grad
            else:
                evaluate(x, y)
                optimizer.step()
        assert calls == len(BATCHES), "one evaluation a step"
        runs.append((weights(model), projector.strength()))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert max(runs[0][1].values()) > 0


def test_report_and_strength() -> None:
    model = make_toy()
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
    assert projector.report.step == 0 and set(projector.strength().values()) == {0.0}
    for number, (x, y) in enumerate(BATCHES, start=1):
        cross_entropy(model(x), y).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        optimizer.step()
        optimizer.zero_grad()
        report = projector.report
        assert report.step == number and not report.skipped and report.nonfinite_layers == []
        assert report.grad_norm == pytest.approx(norm, rel=1e-6)
        strength = projector.strength()
        assert report.strength_mean == pytest.approx(sum(strength.values()) / len(strength), rel=1e-6)
        assert 0 <= report.conflict_rate <= 1 and (report.conflict_rate * len(strength)) % 1 == pytest.approx(
            0, abs=1e-9
        )
    assert projector.report.strength_mean > 0
    assert list(strength) == [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")]


def test_a_nonfinite_gradient_is_skipped() -> None:
    model = make_toy()
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
    train(model, optimizer, steps=5)
    before, state = weights(model), projector.state_dict()
    moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
    x, y = BATCHES[5]
    cross_entropy(model(x), y).backward()
    model.blocks[1].gain.grad.fill_(math.inf)
    optimizer.step()
    assert projector.report.skipped and projector.report.nonfinite_layers == ["blocks.1.gain"]
    assert math.isnan(projector.report.grad_norm) and projector.report.step == 6
    assert same(before, weights(model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, [t for s in optimizer.state.values() for t in s.values()], strict=True)
    )
    after = projector.state_dict()
    for key, values in state["layers"].items():
        assert same(values, after["layers"][key])
    assert same(state["previous"], after["previous"]) and state["scalars"] == after["scalars"]


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
def test_torchs_dummy_step_is_no_step(optimizer_of: Callable[..., Any]) -> None:
    """torch's get_optimizer_state_dict and set_optimizer_state_dict make optimizer state by a step with zero gradients
    and learning rate 0: it must not count, neither for ω nor for what is kept of the step before."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    straight, _ = run(optimizer_of, strength_lr=0.05)
    model = make_toy()
    optimizer = optimizer_of(model)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
    get_optimizer_state_dict(model, optimizer)
    assert projector.report.step == 0
    train(model, optimizer, steps=6)
    optimizer.zero_grad()
    before = projector.state_dict()
    optimizer.state.clear() if optimizer_of is sgd else None
    get_optimizer_state_dict(model, optimizer)
    after = projector.state_dict()
    assert before["scalars"] == after["scalars"] and before["step"] == after["step"] == 6
    assert all(same(before["layers"][key], after["layers"][key]) for key in before["layers"])
    assert same(before["previous"], after["previous"])
    train(model, optimizer, steps=6, start=6)
    got = weights(model)
    # Adam has counted the dummy step, so only SGD's weights are the same bits.
    assert optimizer_of is adamw or same(straight, got)


def test_warm_up_from_zero_is_a_step() -> None:
    """A learning rate of 0 with a real gradient counts: t = 1 is the first step of warm-up."""
    model = make_toy()
    optimizer = sgd(model, lr=0.0)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model))
    train(model, optimizer, steps=2)
    assert projector.report.step == 2 and projector.method.steps == 2
    assert set(projector.strength().values()) == {0.0}


def test_fused_optimizer_under_a_gradient_scaler() -> None:
    """A fused optimizer unscales inside its step, after the hook: nothing of ours may see the scale."""
    options = {"strength_lr": 0.05, "max_grad_norm": 0.3}
    plain, expected = run(lambda model: adamw(model, fused=True), **options)
    model = make_toy()
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), **options)
    for x, y in BATCHES:
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert projector.report.grad_norm == pytest.approx(expected.report.grad_norm, rel=1e-4)
    for name, weight in weights(model).items():
        torch.testing.assert_close(plain[name], weight, atol=1e-5, rtol=0)


def test_accelerate() -> None:
    """Attached before or after ``prepare``: the wrapped optimizer's inner one is the one that steps."""
    accelerate = pytest.importorskip("accelerate")
    plain, _ = run(strength_lr=0.05)
    for late in (False, True):
        model = make_toy()
        optimizer: Any = adamw(model)
        accelerator = accelerate.Accelerator(cpu=True)
        if not late:
            projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        if late:
            projector = digrap_scale.attach(model, optimizer, reference=make_theta0(make_toy()), strength_lr=0.05)
        for x, y in BATCHES:
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert projector.report.step == len(BATCHES) and same(plain, weights(model))


class ForTrainer(Toy):
    """The toy with the signature that transformers' Trainer calls."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": cross_entropy(super().forward(x), labels)}


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    plain, _ = run(
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), strength_lr=0.05
    )
    torch.manual_seed(0)
    model = ForTrainer()
    optimizer = adamw(model)
    projector = digrap_scale.attach(model, optimizer, reference=make_theta0(model), strength_lr=0.05)
    samples = [{"x": x, "labels": y} for xs, ys in BATCHES for x, y in zip(xs, ys, strict=True)]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(samples)

    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    InOrder(model, arguments, train_dataset=samples, optimizers=(optimizer, constant)).train()
    assert projector.report.step == len(BATCHES)
    for name, weight in weights(model).items():
        torch.testing.assert_close(plain[name], weight, atol=1e-6, rtol=0)


# What it refuses: (what is done to the call, error, fragments of its one line).


def call(**changes: Any) -> Callable[[Path], None]:
    def attach(_: Path) -> None:
        model = changes.pop("model", None) or make_toy()
        optimizer = changes.pop("optimizer", "missing")
        optimizer = sgd(model) if optimizer == "missing" else optimizer
        digrap_scale.attach(model, optimizer, **{"reference": make_theta0(make_toy()), **changes})

    return attach


class Container(torch.optim.AdamW):
    """As torchtitan's: an optimizer of all parameters that steps others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters())
        self.optimizers = [sgd(model)]


def container(_: Path) -> None:
    model = make_toy()
    digrap_scale.attach(model, Container(model), reference="initial")


def foreign_optimizer(_: Path) -> None:
    digrap_scale.attach(make_toy(), sgd(make_toy()), reference="initial")


def nothing_trains(_: Path) -> None:
    model = make_toy().requires_grad_(False)
    digrap_scale.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), reference="initial")


def strided_weight(_: Path) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    digrap_scale.attach(model, sgd(model), reference="initial")


def two_optimizers(_: Path) -> None:
    model = make_toy()
    digrap_scale.attach(model, [sgd(model.blocks), sgd(model.head)], reference="initial")


def attached_twice(_: Path) -> None:
    model = make_toy()
    optimizer = sgd(model)
    for _ in range(2):
        digrap_scale.attach(model, optimizer, reference="initial")


def one_method_twice(_: Path) -> None:
    method = DiGraP(0.05)
    for model in (make_toy(), make_toy()):
        digrap_scale.attach(model, sgd(model), method=method, reference="initial")


def wrong_file(folder: Path) -> None:
    save_file({"embed.weight": torch.zeros(5, 5)}, folder / "model.safetensors")
    model = make_toy()
    digrap_scale.attach(model, sgd(model), reference=folder)


def integer_mapping(_: Path) -> None:
    model = make_toy()
    theta0 = make_theta0(model)
    theta0["head.bias"] = torch.zeros(3, dtype=torch.int64)
    digrap_scale.attach(model, sgd(model), reference=theta0)


def lbfgs(_: Path) -> None:
    model = make_toy()
    digrap_scale.attach(model, torch.optim.LBFGS(model.parameters()), reference="initial")


def differentiable(_: Path) -> None:
    model = make_toy()
    digrap_scale.attach(model, torch.optim.AdamW(model.parameters(), differentiable=True), reference="initial")


def idle_rename(folder: Path) -> None:
    model = make_toy()
    save_file(make_theta0(model), folder / "model.safetensors")
    digrap_scale.attach(
        model, sgd(model), reference=folder, not_projected=["^head"], reference_rename={"^blocsk": "blocks"}
    )


REFUSALS: list[tuple[str, Callable[[Path], None], type[Exception], str]] = [
    ("method", call(method="digrab"), ConfigError, "method: expected one of none, digrap,"),
    ("option", call(strength=1.0), ConfigError, "method digrap:"),
    (
        "instance and option",
        call(method=DiGraP(), strength_lr=1.0),
        ConfigError,
        "strength_lr: options go with a method's name",
    ),
    (
        "placement",
        call(reference_placement="disk"),
        ConfigError,
        "reference_placement: expected 'device', 'cpu' or 'stream', found 'disk'",
    ),
    (
        "stream what is in memory",
        call(reference_placement="stream"),
        ConfigError,
        "pass a path, or placement 'device' or 'cpu'",
    ),
    (
        "stream and backward",
        call(reference_placement="stream", statistics="backward"),
        ConfigError,
        "statistics='backward' needs the reference in memory",
    ),
    ("statistics", call(statistics="early"), ConfigError, "statistics: expected 'step' or 'backward', found 'early'"),
    ("projection", call(projection="both"), ConfigError, "projection: expected 'separate' or 'fused', found"),
    ("fused sgd", call(projection="fused"), ConfigError, "projection='fused': the optimizer is SGD, expected torch's"),
    ("clip 0", call(max_grad_norm=0.0), ConfigError, "max_grad_norm: expected a positive number, found 0.0"),
    ("clip nan", call(max_grad_norm=math.nan), ConfigError, "max_grad_norm: expected a positive number, found nan"),
    (
        "kernels",
        call(kernels="fast"),
        ConfigError,
        "attach: kernels must be auto, eager, compile or native, found 'fast'",
    ),
    ("no optimizer", call(optimizer=None), ConfigError, "an optimizer is needed for a plain, DDP or FSDP2 model"),
    (
        "no module",
        call(model="model", optimizer=None),
        ConfigError,
        "expected a torch module or a DeepSpeed engine, found str",
    ),
    ("two optimizers", two_optimizers, ConfigError, "optimizer: expected one torch optimizer, found list"),
    ("twice", attached_twice, ConfigError, "this optimizer has a projector already; call its detach() first"),
    ("one method twice", one_method_twice, ConfigError, "attach: this digrap is attached already, and holds that"),
    ("container", container, ConfigError, "expected one torch optimizer, found Container; of several, attach to each"),
    ("foreign", foreign_optimizer, ConfigError, "the optimizer trains 15 tensors that are no parameters of the model"),
    ("frozen", nothing_trains, ConfigError, "the optimizer trains no parameter of the model"),
    ("strides", strided_weight, ConfigError, "weight: its memory is not contiguous"),
    ("no reference", call(reference=None), ConfigError, "a reference is needed for 15 layers (embed.weight, …)"),
    (
        "mapping of others",
        call(reference={"x": torch.zeros(1)}),
        ConfigError,
        "none of its 1 names is a trained parameter",
    ),
    (
        "mapping shape",
        call(reference={"head.bias": torch.zeros(4)}),
        CheckpointError,
        "head.bias: expected shape [3], found [4]",
    ),
    ("mapping dtype", integer_mapping, CheckpointError, "head.bias: expected a floating dtype, found torch.int64"),
    ("not_projected", call(not_projected=["^haed"]), ConfigError, "'^haed' matches no trained parameter"),
    (
        "no file",
        call(reference="/nowhere/x.safetensors"),
        CheckpointError,
        "/nowhere/x.safetensors: does not exist; give a folder, a .safetensors file or its index",
    ),
    ("lbfgs", lbfgs, ConfigError, "LBFGS takes new gradients within one step()"),
    ("differentiable", differentiable, ConfigError, "set differentiable=False"),
    (
        "idle rename",
        idle_rename,
        ConfigError,
        "reference.rename: '^blocsk' matches no parameter of the model; nearest: b",
    ),
    (
        "rename without a file",
        call(reference_rename={"a": "b"}),
        ConfigError,
        "reference.rename: maps names of a file, but the reference is a mapping; remove it",
    ),
    ("other file", wrong_file, CheckpointError, "this reference does not fit the model (14 missing, 0 different)"),
]


@pytest.mark.parametrize(("make", "error", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_refuses(tmp_path: Path, make: Callable[[Path], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make(tmp_path)
    assert message in str(caught.value)
    if "does not fit" not in message:
        assert "\n" not in str(caught.value)


def test_an_instance_starts_anew_when_attached_again() -> None:
    """Attaching prepares a method: one that has run elsewhere carries nothing over."""
    method = DiGraP(0.05)
    first, projector = run(method=method)
    projector.detach()
    second, _ = run(method=method)
    assert same(first, second)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.0), (0.0, 0.999)])
def test_recomputed_equals_stored(betas: tuple[float, float]) -> None:
    """d_{t-1} from Adam's moments, for β = 0 too.

    With β₂ = 0 and eps = 1e-8 a gradient of exactly 0 makes a step of lr · m / eps: weights of 1e2, in whose last digits the
    small steps are lost, however they are undone. A larger eps keeps the case in float32's range.
    """
    strengths, eps = [], 1e-8 if betas[1] else 1e-4
    for previous in ("stored", "recomputed"):
        model = make_toy()
        optimizer = adamw(model, betas=betas, eps=eps, weight_decay=0.01)
        projector = digrap_scale.attach(
            model, optimizer, reference=make_theta0(model), strength_lr=0.05, previous=previous
        )
        train(model, optimizer)
        strengths.append(projector.strength())
    assert strengths[0] == pytest.approx(strengths[1], abs=1e-5)
    assert max(strengths[0].values()) > 0.02
