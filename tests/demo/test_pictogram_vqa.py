"""Pictogram-VQA's sets from the shipped tiles: determinism, held-out concepts, what each set shifts, the prior."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.data.shards import Manifest
from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo.settings import ASSETS

SAMPLES = 50
WRITTEN = (vqa.TRAIN, vqa.VALIDATION, *vqa.TESTS, vqa.ADVERSARIAL)
Sets = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def material() -> tuple[Any, dict[str, str]]:
    return vqa.read_tiles(ASSETS / "pictograms")


@pytest.fixture(scope="module")
def folder(material: tuple[Any, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for spec in WRITTEN:
        vqa.write_set(spec, *material, folder, range(SAMPLES))
    return folder


@pytest.fixture(scope="module")
def sets(folder: Path) -> Sets:
    return {spec.name: [sample["meta"] for sample in vqa.read_set(folder, vqa.prefix(spec))] for spec in WRITTEN}


def test_equal_seeds_give_equal_shards(material: tuple[Any, dict[str, str]], folder: Path, tmp_path: Path) -> None:
    again = vqa.write_set(vqa.TESTS[0], *material, tmp_path, range(SAMPLES))
    kept = Manifest.read(folder / "id.manifest.json")
    assert again == kept
    for entry in kept.shards:
        assert hashlib.sha256((folder / entry.file).read_bytes()).hexdigest() == entry.sha256


def test_a_sample_does_not_depend_on_the_others(material: tuple[Any, dict[str, str]]) -> None:
    (alone,) = vqa.samples(vqa.ADVERSARIAL, *material, [7])
    assert alone == list(vqa.samples(vqa.ADVERSARIAL, *material, range(8)))[7]


def test_held_out_concepts_are_in_no_training_page(material: tuple[Any, dict[str, str]], sets: Sets) -> None:
    tiles, _ = material
    held_out = {concept for parts in tiles.values() for concept in parts["test"]}
    trained = {concept for parts in tiles.values() for concept in parts.get("train", {})}
    assert held_out and trained and not held_out & trained
    for meta in sets["train"]:
        assert {concept for concept in meta["concepts"] if concept} <= trained
    for spec in (vqa.VALIDATION, *vqa.TESTS, vqa.ADVERSARIAL):
        for meta in sets[spec.name]:
            # A name that was never seen cannot be given: "what" alone is asked about training concepts, in new pages.
            allowed = trained if meta["question_type"] == "what" else held_out
            assert {concept for concept in meta["concepts"] if concept} <= allowed, meta


def test_styles_do_not_leak(sets: Sets) -> None:
    assert {meta["style"] for meta in sets["train"]} == {vqa.SOURCE}
    for spec in vqa.TESTS:
        found = {meta["style"] for meta in sets[spec.name]}
        assert found == set(spec.styles)
        if spec.modality in ("vision", "multimodal"):
            assert vqa.SOURCE not in found


def test_training_and_test_pages_differ(sets: Sets) -> None:
    def pages(spec: vqa.SetSpec) -> set[str]:
        return {str((meta["question"], meta["concepts"])) for meta in sets[spec.name]}

    assert not pages(vqa.TRAIN) & pages(vqa.TESTS[0])
    assert pages(vqa.VALIDATION) != pages(vqa.TESTS[0])


def test_only_what_is_said_is_shifted(sets: Sets) -> None:
    straight, reworded = sets["id"], sets["reworded"]
    for one, other in zip(straight, reworded, strict=True):
        assert one["concepts"] == other["concepts"] and one["answers"] == other["answers"]
        assert one["question"] != other["question"]
    yes = {
        name: Counter(meta["answers"][0] for meta in sets[name] if meta["question_type"] == "yes/no")["yes"]
        for name in ("id", "answer prior")
    }
    assert yes["id"] > yes["answer prior"]


def test_every_type_is_asked_where_there_are_names(sets: Sets) -> None:
    for spec in (vqa.TRAIN, *vqa.TESTS):
        types = Counter(meta["question_type"] for meta in sets[spec.name])
        assert len(types) == (4 if spec.name in ("older styles", "other line style") else 5)
        assert max(types.values()) - min(types.values()) <= 3


def test_prior_is_the_most_frequent_answer(folder: Path, sets: Sets) -> None:
    prior = vqa.prior_answers(folder)
    train = sets["train"]
    for kind, answer in prior.items():
        counts = Counter(meta["answers"][0] for meta in train if meta["question_type"] == kind)
        assert counts[answer] == max(counts.values())
    assert prior["yes/no"] == "yes" and prior["how many"] == "1"
