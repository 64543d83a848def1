"""Adapters out of training checkpoints: PEFT opens what comes out, with the base beside it in the checkpoint or elsewhere."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from digrap_scale.checkpoint import merge
from digrap_scale.checkpoint.convert import convert
from digrap_scale.checkpoint.diff import diff
from digrap_scale.checkpoint.formats import open_source
from digrap_scale.checkpoint.layout import step_folder
from digrap_scale.errors import CheckpointError
from tests.checkpoint.test_convert import adapted, contents, outputs
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_runs import run_all, run_here, values_of
from tests.distributed.test_resume import LORA
from tests.models.tiny import save_vit


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["text_projection"]}),
        ("llava", {"target_modules": ["q_proj", "embed_tokens"], "bias": "all"}),
    ],
)
def test_peft_opens_it(kind: str, options: dict[str, Any], frozen: bool, tmp_path: Path) -> None:
    model = adapted(kind, tmp_path, **options)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if frozen or name in trained}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match="holds a PEFT adapter, and no adapter_config.json goes with it"):
        convert(tmp_path / "dcp", tmp_path / "out", "safetensors")
    companions = {"companions": tmp_path / "adapter", "verify": True}
    path = convert(tmp_path / "dcp", tmp_path / "out", "safetensors", **companions)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (path, tmp_path / "adapter"))
    base = {
        name for name in theirs if name.endswith("embed_tokens.base_layer.weight")
    }  # PEFT's copy of a frozen weight
    assert ours.keys() == theirs.keys() - base
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fresh = type(model.get_base_model()).from_pretrained(tmp_path / "base")
    assert torch.equal(outputs(PeftModel.from_pretrained(fresh, path), kind), outputs(model, kind))
    merged = convert(
        tmp_path / "dcp",
        tmp_path / "merged",
        "safetensors",
        merge_into=tmp_path / "base",
        companions=tmp_path / "adapter",
    )
    plain = convert(tmp_path / "adapter", tmp_path / "plain", "safetensors", merge_into=tmp_path / "base")
    ours, theirs = contents(merged), contents(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_s_own(frozen: bool, tmp_path: Path) -> None:
    """As a run writes it, with its small files; without frozen weights nothing else can be made of it."""
    base = save_vit(tmp_path / "vit", classes=16)
    checkpoint = {"final": True, "frozen_weights": frozen}
    values = values_of(base, tmp_path / "run", "single", model=LORA, training={"steps": 3}, checkpoint=checkpoint)
    run_here(values)
    source, final = step_folder(tmp_path / "run", 3), tmp_path / "run" / "final"
    path = convert(source, tmp_path / "out", "safetensors", verify=True)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (path, final))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (path, final):
        fresh = ViTForImageClassification.from_pretrained(base)
        size = fresh.config.image_size
        images = torch.nn.functional.interpolate(pixels, size=(size, size))
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(fresh, folder).eval()(images).logits)
    assert torch.equal(*logits)
    merged = convert(source, tmp_path / "merged", "safetensors", merge_into=base)
    plain = convert(final, tmp_path / "plain", "safetensors", merge_into=base)
    assert all(drift.norm == 0 for drift in diff(merged, plain).values())
    if frozen:
        assert all(
            drift.norm == 0
            for drift in diff(convert(source, tmp_path / "own", "safetensors", merge_into=""), plain).values()
        )
        return
    for call in (
        lambda: convert(source, tmp_path / "no", "safetensors", merge_into=""),
        lambda: convert(source, tmp_path / "no", "dcp"),
        lambda: diff(source, source),
    ):
        with pytest.raises(CheckpointError, match=r"frozen weights, .* are not in it .*--merge-adapter BASE"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_out_of_deepspeed_s_own(backend: str, tmp_path: Path) -> None:
    """Two ranks' engine checkpoint, and ours beside it: the same adapter."""
    base = save_vit(tmp_path / "vit", classes=16)
    values = values_of(
        base, tmp_path / "run", backend, model=LORA, training={"steps": 3}, checkpoint={"deepspeed_native": True}
    )
    run_ranks(2, tmp_path / "ranks", run_all, {"run": values})
    source = step_folder(tmp_path / "run", 3)
    ours = convert(source, tmp_path / "ours", "safetensors", verify=True)
    theirs = convert(
        source / "deepspeed" / "engine", tmp_path / "theirs", "safetensors", companions=source / "model", verify=True
    )
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert (
        len(ours) > 4 and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


@pytest.mark.parametrize("to", ["dcp", "zero"])
def test_an_adapter_through_another_format(to: str, tmp_path: Path) -> None:
    adapted("llava", tmp_path, target_modules=["q_proj"])
    path = convert(tmp_path / "adapter", tmp_path / to, to, world_size=2, verify=True)
    back = convert(path, tmp_path / "back", "safetensors", companions=tmp_path / "adapter")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (back, tmp_path / "adapter"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted("llava", tmp_path, target_modules=["q_proj"])
    state = {name.replace(".default", ".second"): tensor for name, tensor in model.state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(CheckpointError, match=r"expected one adapter, named default, found \.second\.weight"):
        convert(tmp_path / "dcp", tmp_path / "out", "safetensors", companions=tmp_path / "adapter")


def test_merging_holds_one_module_s_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of modules: A and B are let go of when their weight has been read."""
    adapted("llava", tmp_path, target_modules=["q_proj", "v_proj", "k_proj"])
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    original, made, most = merge._matrix, [0], [0]

    def noted(part: Any) -> torch.Tensor:
        matrix = original(part)
        alive.add(matrix)
        made[0] += 1
        most[0] = max(most[0], len(list(alive)))
        return matrix

    monkeypatch.setattr(merge, "_matrix", noted)
    source = merge.merge_adapter(open_source(tmp_path / "base"), open_source(tmp_path / "adapter"))
    for tensor in source.tensors.values():
        for _ in tensor.pieces(piece_bytes=64):
            pass
    assert made[0] > 8 and most[0] == 2 and not list(alive)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"target_modules": ["embed_tokens"]}, "adapts"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "trains"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_tied_weight_is_not_merged(options: dict[str, Any], what: str, own: bool, tmp_path: Path) -> None:
    """Its head kept the pre-trained weight in training; tied to the merged one it would be another model."""
    model = adapted("paligemma", tmp_path, **options)
    told = f"{what} .*embed_tokens.* ties to another: merged, both would change"
    with pytest.raises(CheckpointError, match=told):
        if not own:
            convert(tmp_path / "adapter", tmp_path / "out", "safetensors", merge_into=tmp_path / "base")
            return
        # As a run's checkpoint has it: stored once, under the name that PEFT gave it, the head as an alias.
        state = {n: tensor for n, tensor in model.state_dict().items() if not n.endswith("lm_head.weight")}
        plain = [
            n for n in state if n.endswith(("embed_tokens.base_layer.weight", "embed_tokens.original_module.weight"))
        ]
        dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        source = replace(open_source(tmp_path / "dcp"), aliases={"base_model.model.lm_head.weight": plain[0]})
        merge.merge_own(source, tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
