"""From a checkpoint's names to the model's: transformers' renaming, the user's own, tied weights, the diff."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import digrap_scale
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.reference.names import match_names, tied_aliases
from digrap_scale.reference.store import SafetensorsReader
from digrap_scale.types import ShardSpec
from tests.distributed.vlm_models import KINDS, make_vlm, save_vlm


class Small(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.embed(ids)))


def specs_of(model: nn.Module) -> list[ShardSpec]:
    return [ShardSpec(name, tuple(p.shape), 0, p.numel()) for name, p in model.named_parameters()]


def match(model: nn.Module, folder: Path, rename: dict[str, str] | None = None, exempt: tuple[str, ...] = ()) -> dict:
    return match_names(model, SafetensorsReader(folder), specs_of(model), tied_aliases(model), rename or {}, exempt)


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_same_names(tmp_path: Path) -> None:
    model = Small()
    save(tmp_path, dict(model.named_parameters()))
    assert match(model, tmp_path) == {name: [name] for name, _ in model.named_parameters()}


def test_whole_diff(tmp_path: Path) -> None:
    """Everything that does not fit, at once: missing with the nearest name, shapes, dtypes, and what nobody used."""
    model = Small()
    save(
        tmp_path,
        {
            "embed.weigth": model.embed.weight,
            "body.weight": torch.zeros(4, 5),
            "body.bias": torch.zeros(4).to(torch.float8_e4m3fn),  # without its scale
            "out.weight": model.out.weight,
            "vision.extra": torch.zeros(1),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        match(model, tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: this reference does not fit the model (1 missing, 2 different)",
        "  missing: embed.weight (nearest in the file: embed.weigth)",
        "  different: body.weight: expected shape [4, 4], found [4, 5] in body.weight",
        "  different: body.bias: expected F64, F32, F16, BF16, found F8_E4M3 in body.bias",
        "  not used: embed.weigth",
        "  not used: vision.extra",
        "  names that differ can be mapped by reference.rename (regex: replacement)",
    ]


def test_rename(tmp_path: Path) -> None:
    model = Small()
    save(tmp_path, {f"base.{name.replace('body', 'trunk')}": p for name, p in model.named_parameters()})
    found = match(model, tmp_path, {"^": "base.", "body": "trunk"})
    assert found["body.weight"] == ["base.trunk.weight"] and len(found) == 4


def test_new_layers_need_no_tensor(tmp_path: Path) -> None:
    model = Small()
    save(tmp_path, {name: p for name, p in model.named_parameters() if not name.startswith("out")})
    assert set(match(model, tmp_path, exempt=("out.weight",))) == {"embed.weight", "body.weight", "body.bias"}


@pytest.mark.parametrize("names", [["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"]])
def test_tied_weights(tmp_path: Path, names: list[str]) -> None:
    """One name in the file, whichever, or both."""
    model = Small(tie=True)
    tensors = {"body.weight": model.body.weight, "body.bias": model.body.bias}
    save(tmp_path, tensors | dict.fromkeys(names, model.embed.weight))
    found = match(model, tmp_path)
    assert found == {"embed.weight": names, "body.weight": ["body.weight"], "body.bias": ["body.bias"]}
    projector = digrap_scale.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), reference=tmp_path)
    assert torch.equal(projector._reference.slices_L[0].view(6, 4), model.embed.weight)


def test_tied_weights_that_differ_in_the_file(tmp_path: Path) -> None:
    model = Small(tie=True)
    save(tmp_path, dict(model.named_parameters()) | {"out.weight": model.embed.weight + 1})
    with pytest.raises(CheckpointError, match="'embed.weight' and 'out.weight' differ, but the model ties them"):
        digrap_scale.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), reference=tmp_path)


def test_one_tied_copy_of_another_shape(tmp_path: Path) -> None:
    model = Small(tie=True)
    save(tmp_path, dict(model.named_parameters()) | {"out.weight": torch.zeros(7, 4)})
    with pytest.raises(
        CheckpointError, match=r"different: embed.weight: expected shape \[6, 4\], found \[7, 4\] in out.weight"
    ):
        match(model, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_names(tmp_path: Path, kind: str) -> None:
    """Every parameter of a saved model is found, by values, whatever the file calls it."""
    model = make_vlm(kind)
    save_vlm(kind, tmp_path)
    reader = SafetensorsReader(tmp_path)
    found = match(model, tmp_path)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        (file_name,) = found[name]
        assert torch.equal(reader.read(file_name).view(parameter.shape), parameter.bfloat16()), name
    if kind != "clip":
        assert all(found[name] != [name] for name in found if "language_model" in name), "nothing was renamed"


def test_head_model_from_a_base_checkpoint(tmp_path: Path) -> None:
    """A classifier finds its body in a file of the bare model, whose names lack the prefix."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = ViTForImageClassification(config)
    found = match(model, tmp_path, exempt=("classifier.weight", "classifier.bias"))
    assert set(found) == {name for name, _ in model.named_parameters() if not name.startswith("classifier")}


def test_peft_model_finds_the_modules_it_trains_in_full(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path)
    head = base.classifier.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    projector = digrap_scale.attach(model, torch.optim.SGD(trained, lr=0.1), reference=tmp_path)
    kept = {spec.name: r for spec, r in zip(projector.backend.specs, projector._reference.slices_L, strict=True)}
    assert torch.equal(kept["base_model.model.classifier.modules_to_save.default.weight"].view_as(head), head)
    assert [name for name, r in kept.items() if r is None] == [name for name in kept if "lora_" in name] != []


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_hold_a_part_of_the_weights_are_not_held_at_zero(start: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for reference in (None, "zero", tmp_path):
        with pytest.raises(ConfigError, match=f"init_lora_weights: '{start}'.*pass reference='initial'"):
            digrap_scale.attach(model, optimizer, reference=reference)
    digrap_scale.attach(model, optimizer, reference="initial")


def test_what_we_use_of_transformers() -> None:
    """Not in transformers' top level: if a version moves or changes them, this is where it shows."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with torch.device("meta"):
        model = make_vlm("llava")
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    assert renamings
    meta = model.state_dict()
    for old, new in {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    }.items():
        assert rename_source_key(old, renamings, converters, model.base_model_prefix, meta) == (new, None)
        assert new in meta


def test_tied_aliases() -> None:
    assert tied_aliases(Small(tie=True))["embed.weight"] == ["embed.weight", "out.weight"]
    assert tied_aliases(Small())["embed.weight"] == ["embed.weight"]


def test_a_transformers_model_inside_another_module(tmp_path: Path) -> None:
    """A LightningModule, or one's own: the names in the file are found, whatever the attribute is called."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"vlm": make_vlm("llava")})
            self.head = nn.Linear(2, 2)

    outer, folder = Outer(), save_vlm("llava", tmp_path)
    inside = match(outer.inner["vlm"], folder)
    found = match(outer, folder, exempt=("head.weight", "head.bias"))
    assert found == {f"inner.vlm.{name}": of_file for name, of_file in inside.items()}
    assert any(name not in of_file for name, of_file in inside.items()), "no name differs: nothing was tested"
    renamed = match(outer, folder, {r"^inner\.vlm\.": ""}, exempt=("head.weight", "head.bias"))
    assert renamed == found
