"""Drift between two checkpoints against plain torch on whole tensors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ViTForImageClassification

from digrap_scale.checkpoint import diff as module
from digrap_scale.checkpoint.diff import diff, layer_of, total
from digrap_scale.cli import main
from digrap_scale.errors import CheckpointError
from tests.models.tiny import save_vit


def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"net.0.weight": (40, 30), "net.0.bias": (40,), "net.1.weight": (7,), "head.weight": (3, 2), "same": (4,)}
    a = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    b = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in a.items()}
    return {**a, "zero": torch.zeros(3), "none": torch.zeros(0)}, {
        **b,
        "same": a["same"].clone(),
        "zero": torch.ones(3),
        "none": torch.zeros(0),
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, state in zip("ab", states(), strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return tmp_path / "a", tmp_path / "b"


def test_equals_whole_tensors(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", 100)
    found = diff(*folders)
    a, b = states()
    assert set(found) == set(a)
    for name in a:
        x, y = a[name].double(), b[name].double()
        assert found[name].norm == pytest.approx(float((x - y).norm()))
        assert found[name].largest == (float((x - y).abs().max()) if x.numel() else 0)
        if name not in ("zero", "none"):
            assert found[name].relative == pytest.approx(float((x - y).norm() / x.norm()))
            assert found[name].cosine == pytest.approx(float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)))
    assert found["same"].norm == 0 and found["same"].cosine == 1
    assert found["zero"].relative == math.inf and math.isnan(found["zero"].cosine)


def test_files_of_transformers_and_of_a_model(tmp_path: Path) -> None:
    """`save_pretrained` and `state_dict` name a ViT's layers differently."""
    model = ViTForImageClassification.from_pretrained(save_vit(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "b" / "model.safetensors")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert set(file.keys()) != set(state)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert set(found) == set(state) and all(drift.largest == pytest.approx(1, abs=1e-6) for drift in found.values())


def test_layers_are_sums(folders: tuple[Path, Path]) -> None:
    tensors, layers = diff(*folders), diff(*folders, by_layer=True)
    assert layers["net.0"].squares == pytest.approx(tensors["net.0.weight"].squares + tensors["net.0.bias"].squares)
    assert layers["net.0"].elements == 1240 and set(layers) == {"net.0", "net.1", "head", "same", "zero", "none"}
    assert total(tensors).norm == pytest.approx(total(layers).norm)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.10.mlp.up.weight", "model.layers.10"),
        ("head.weight", "head"),
        ("scale", "scale"),
        ("a.b.bias", "a.b"),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, picture = tmp_path / "d.json", tmp_path / "d.png"
    arguments = [
        "diff",
        *map(str, folders),
        "--by-layer",
        "--rows",
        "2",
        "--json",
        str(json_path),
        "--picture",
        str(picture),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "zero" in printed and "total" in printed and "same" not in printed and "2 of 6" in printed
    content = json.loads(json_path.read_text())
    assert content["parts"]["zero"]["relative"] is None
    assert content["total"]["norm"] == pytest.approx(total(diff(*folders)).norm)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-1], "d.xyz"]) == 2


def test_other_tensors_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="cannot compare .*: only in .*a: head.weight"):
        diff(folders[0], tmp_path / "w.safetensors")


def test_what_is_no_number_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is in the tensor; and it stands first in a table of the largest."""
    a = {"net.0.weight": torch.zeros(4), "net.1.weight": torch.ones(4), "net.2.weight": torch.ones(4)}
    b = {
        "net.0.weight": torch.ones(4),
        "net.1.weight": torch.tensor([1.0, math.nan, 3.0, 1.0]),
        "net.2.weight": torch.ones(4),
    }
    for name, state in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [math.isnan(found[name].largest) for name in a] == [False, True, False]
    assert math.isnan(total(found).largest) and math.isnan(total(dict(reversed(found.items()))).largest)
    file, picture = tmp_path / "drift.json", tmp_path / "drift.png"
    options = ["--rows", "2", "--json", str(file), "--picture", str(picture)]
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.index("net.1.weight") < printed.index("net.0.weight") and "net.2.weight" not in printed
    assert json.loads(file.read_text())["parts"]["net.1.weight"]["max"] is None and picture.is_file()
