"""What is withheld from training: a function of keys alone, never trained on, measured as `validation`."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from digrap_scale.cli import main
from digrap_scale.config import parse_config
from digrap_scale.config.schema import HoldOutConfig
from digrap_scale.data.hold_out import held_rows, is_held_out, split
from digrap_scale.data.loader import build_evaluation_loader, build_training_loader
from digrap_scale.data.manifest import MANIFEST_SUFFIX
from digrap_scale.data.shards import ShardSet, write_shards
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.training import batches as training_batches
from tests.config.base import BASE, problems
from tests.data.samples import NumberTask, make_samples, raw_tar, sample_members
from tests.data.vqa_samples import vqa_shard
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_runs import run_here
from tests.models.tiny import save_clip, save_vit
from tests.models.tiny_vlm import save_tiny_vlm

SETTINGS = HoldOutConfig(fraction=0.3, seed=4)
SAMPLES = 101


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    write_shards(make_samples(SAMPLES), tmp_path, prefix="p", samples_per_shard=40)
    return ShardSet.open([f"{tmp_path}/p-*.tar"])


def expected() -> set[int]:
    return {i for i in range(SAMPLES) if is_held_out(f"s{i:06d}", SETTINGS)}


def numbers(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch.labels.tolist() if number >= 0]


def parts(shards: ShardSet) -> tuple[ShardSet, ShardSet]:
    return split(shards, held_rows(shards, SETTINGS), SETTINGS)


def test_keys_tell_which(shards: ShardSet) -> None:
    kept, held = parts(shards)
    assert 15 < len(expected()) < 46
    loader = build_evaluation_loader(held, NumberTask(), batch_samples=4, rank=0, world_size=1, workers=0)
    assert set(numbers(loader)) == expected() and held.samples == len(expected())
    loader = build_evaluation_loader(kept, NumberTask(), batch_samples=4, rank=0, world_size=1, workers=0)
    assert sorted(numbers(loader)) == sorted(set(range(SAMPLES)) - expected())


def test_other_shards_of_the_same_samples_withhold_the_same(shards: ShardSet, tmp_path: Path) -> None:
    """Sharded anew, and without a manifest: as the walk finds them."""
    write_shards(reversed(make_samples(SAMPLES)), tmp_path / "other", prefix="q", samples_per_shard=7)
    (tmp_path / "other" / f"q{MANIFEST_SUFFIX}").unlink()
    _, held = parts(ShardSet.open([f"{tmp_path}/other/q-*.tar"]))
    loader = build_evaluation_loader(held, NumberTask(), batch_samples=5, rank=0, world_size=1, workers=0)
    assert set(numbers(loader)) == expected()


def test_long_keys_have_headers_that_are_not_plain(tmp_path: Path) -> None:
    keys = [f"{'long' * 40}{i}" for i in range(20)] + [f"short{i}" for i in range(20)]
    raw_tar(tmp_path / "x.tar", [member for key in keys for member in sample_members(key)])
    rows = held_rows(ShardSet.open([f"{tmp_path}/x.tar"]), SETTINGS)
    assert rows[0].tolist() == [i for i, key in enumerate(keys) if is_held_out(key, SETTINGS)] != []


@pytest.mark.parametrize("order", ["local", "global"])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_rank_trains_on_it_and_a_resume_is_exact(shards: ShardSet, order: str, workers: int) -> None:
    kept, _ = parts(shards)
    options: dict[str, Any] = {"batch_samples": 4, "seed": 5, "shuffle_buffer_samples": 16, "order": order}
    seen: list[int] = []
    for rank in range(2):

        def fresh(rank: int = rank) -> Any:
            return build_training_loader(kept, NumberTask(), rank=rank, world_size=2, workers=workers, **options)

        whole = [batch.labels.tolist() for batch in islice(fresh(), 20)]
        before = fresh()
        head = [batch.labels.tolist() for batch in islice(before, 7)]
        after = fresh()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert head + [batch.labels.tolist() for batch in islice(after, 13)] == whole
        seen += [number for batch in whole for number in batch]
    assert not set(seen) & expected() and set(seen) == set(range(SAMPLES)) - expected()


def test_a_place_in_another_selection_is_refused(shards: ShardSet) -> None:
    def loader(seed: int) -> Any:
        # As many of the same file, but others: only the selection's name tells them apart.
        settings = HoldOutConfig(fraction=0.3, seed=seed)
        rows = [np.arange(seed, seed + 5), np.arange(3), np.arange(2)]
        kept = split(shards, rows, settings)[0]
        return build_training_loader(kept, NumberTask(), batch_samples=4, rank=0, world_size=1, workers=0, seed=1)

    with pytest.raises(CheckpointError, match="training shards"):
        loader(2).load_state_dict(loader(1).state_dict())


def test_none_or_all_is_no_part(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="data.hold_out.fraction: expected a part of the 101 samples"):
        held_rows(shards, HoldOutConfig(fraction=1e-9))


def test_what_does_not_go_with_it() -> None:
    suite = 'evaluation:\n  suite: [{name: validation, shards: ["x.tar"], shift: id}]\n'
    found = problems(BASE + suite, "data.hold_out={fraction: 0.1}", "data.on_bad_sample=skip", "data.target=caption")
    assert any("evaluation.suite.0.name: expected another name with data.hold_out" in line for line in found)
    assert any("data.on_bad_sample: expected `error` with data.hold_out" in line for line in found)
    assert any("data.hold_out: expected nothing with data.target `caption`" in line for line in found)
    assert problems(BASE, "data.hold_out={fraktion: 0.1}")[0].endswith("did you mean `fraction`?")
    assert "expected a number > 0 and < 1, found `1.0`" in problems(BASE + suite, "data.hold_out={fraction: 1.0}")[0]


# Whole runs.


def values_of(tmp_path: Path, folder: str, backend: str = "single") -> dict[str, Any]:
    return {
        "run": {"folder": f"{tmp_path}/{folder}"},
        "model": {"path": str(tmp_path / "model"), "task": "classification"},
        "data": {
            "train": [f"{tmp_path}/a-*.tar"],
            "classes": f"{tmp_path}/classes.json",
            "hold_out": {"fraction": 0.3, "seed": 4},
            "shuffle_buffer_samples": 10,
        },
        "method": {"name": "digrap", "strength_lr": 0.05},
        "optimizer": {"learning_rate": 1e-3},
        "sharding": {"backend": backend},
        "training": {"epochs": 1, "global_batch_samples": 4},
        "evaluation": {"suite": [{"name": "test", "shards": [f"{tmp_path}/b-*.tar"], "shift": "id"}]},
        "logging": {"every_steps": 1, "tensorboard": False, "layers_every_steps": 5},
        "checkpoint": {"final": True},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(make_samples(60), tmp_path, prefix="a", samples_per_shard=25)
    write_shards(make_samples(12, start=60), tmp_path, prefix="b", samples_per_shard=12)
    (tmp_path / "classes.json").write_text(json.dumps(["class 0", "class 1"]))
    save_vit(tmp_path / "model", classes=2)
    return tmp_path


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text())["rows"][0]["result"])


def held_of(count: int) -> set[str]:
    keys = [f"s{i:06d}" for i in range(count)]
    return {key for key in keys if is_held_out(key, SETTINGS)}


def test_a_run_measures_it_apart(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[ShardSet] = []

    def scan(shards: ShardSet, settings: HoldOutConfig) -> Any:
        scans.append(shards)
        return held_rows(shards, settings)

    monkeypatch.setattr(training_batches, "held_rows", scan)
    keys = run_here(values_of(folder, "run"))
    trained = {key for batch in keys for key in batch if int(key[1:]) < 60}
    assert len(held_of(60)) > 8
    assert len(scans) == 1, (
        "headers are read before the first step, while no rank waits in a collective, and then no more"
    )
    # The same function prepares batches of both; those of training come first, a whole epoch of steps of 4.
    steps = (60 - len(held_of(60))) // 4
    assert not {key for batch in keys[:steps] for key in batch} & held_of(60) and trained
    result = results(folder / "run")
    assert result["sets"]["validation"]["samples"] == len(held_of(60))
    assert result["sets"]["validation"]["shift"] == "validation"
    assert result["id_mean"] == result["sets"]["test"]["accuracy"] and result["ood_mean"] is None
    table = (folder / "run" / "results.md").read_text()
    assert "withheld from training, to select by" in table and "validation" not in table.splitlines()[2]
    layers = [json.loads(line) for line in (folder / "run" / "layers.jsonl").read_text().splitlines()]
    assert len(layers[0]["names"]) == len(layers[1]["drift"]) and layers[1]["step"] == 5
    capsys.readouterr()
    (folder / "run.yaml").write_text(yaml.safe_dump(values_of(folder, "again")))
    assert main(["evaluate", str(folder / "run.yaml"), "--weights", str(folder / "run" / "final")]) == 0
    stored = json.loads((folder / "again" / "evaluation" / "results.json").read_text())["rows"][0]["result"]
    assert stored["sets"]["validation"] == result["sets"]["validation"]
    assert main(["validate", str(folder / "run.yaml")]) == 0
    assert f"data: train: {60 - len(held_of(60))} samples" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_withhold_the_same(folder: Path) -> None:
    values = values_of(folder, "two", "fsdp2")
    batches = run_ranks(2, folder / "ranks", run_here, values)
    steps = (60 - len(held_of(60))) // 4
    for of_rank in batches:
        assert not {key for batch in of_rank[:steps] for key in batch} & held_of(60)
    measured = results(folder / "two")["sets"]["validation"]
    assert measured["samples"] == len(held_of(60))


def test_a_mixture_withholds_of_every_source(folder: Path) -> None:
    from digrap_scale.training.batches import open_training_data

    values = values_of(folder, "run")
    sources = [{"name": n, "shards": [f"{folder}/{n}-*.tar"], "weight": 1} for n in ("a", "b")]
    values["data"] |= {"train": [], "sources": sources, "order": "global"}
    config = parse_config(yaml.safe_dump(values))
    data = open_training_data(config)
    assert data.validation is not None and data.validation.samples == len(held_of(72))
    assert sum(source.shards.samples for source in data.sources) == 72 - len(held_of(72))


def test_answers_and_captioned_classes_are_measured_too(folder: Path) -> None:
    """The other tasks: a small VLM that is asked, and a small CLIP that tells classes apart."""
    shard = str(vqa_shard(folder / "asked" / "train-000000.tar", [1, 2, 0, 1, 1, 1, 1, 1]))
    values = values_of(folder, "vqa")
    suite = [{"name": "same", "shards": [shard], "shift": "id"}]
    values["model"] = {"path": str(save_tiny_vlm("llava", folder / "llava")), "task": "vqa"}
    values["data"] = {"train": [shard], "hold_out": {"fraction": 0.5, "seed": 1}}
    values["evaluation"] = {"suite": suite, "generation": {"max_new_tokens": 2}}
    values["training"] = {"steps": 1, "global_batch_samples": 2}
    run_here(values)
    sets = results(folder / "vqa")["sets"]
    assert 0 < sets["validation"]["samples"] < 8 == sets["same"]["samples"] and sets["validation"]["class_accuracy"]
    values = values_of(folder, "clip")
    values["model"] = {"path": str(save_clip(folder / "clip-model")), "task": "contrastive"}
    values["training"] = {"steps": 1, "global_batch_samples": 2}
    run_here(values)
    assert results(folder / "clip")["sets"]["validation"]["samples"] == len(held_of(60))
