"""VQA scores of a suite, on ranks with unequal shares, equal one process's: sets, groups, standard errors, what is withheld."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.config.schema import Config
from tests.data.samples import raw_tar
from tests.data.vqa_samples import vqa_members, vqa_shard
from tests.distributed.ranks import run_ranks
from tests.distributed.vqa_runs import TEST, TRAIN, evaluate_all, vqa_config
from tests.models.tiny_vlm import save_tiny_vlm

pytestmark = pytest.mark.timeout(600)
SINGLE = 3  # samples of the second set: with batches of two, one rank has a batch and the other a sample and padding


def scored_shard(path: Path, images: list[int], told: dict[str, str]) -> Path:
    """Samples of which ten, three, two and one of the annotators say what the model does, in turn."""
    members = []
    for index, count in enumerate(images):
        (name, meta), *pictures = vqa_members(index, count)
        mine = told[name.removesuffix(".json")]
        says = [10, 3, 2, 1][index % 4]
        stored = {**json.loads(meta), "answers": [mine] * says + [f"other {i}" for i in range(10 - says)]}
        members += [(name, json.dumps(stored).encode()), *pictures]
    return raw_tar(path, members)


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [("fsdp2", 2), pytest.param("ddp", 3, marks=pytest.mark.slow), pytest.param("zero3", 2, marks=pytest.mark.slow)],
)
def test_scores_equal_one_process(backend: str, ranks: int, tmp_path: Path) -> None:
    model = save_tiny_vlm("llava", tmp_path / "model")
    train = str(vqa_shard(tmp_path / "train-000000.tar", TRAIN))
    plain = str(vqa_shard(tmp_path / "plain-000000.tar", TEST))

    def config(backend: str, suite: dict[str, str], **data: Any) -> Config:
        values = vqa_config(str(model), backend, str(tmp_path / backend), train, plain).model_dump()
        values["data"].update(data)
        values["evaluation"]["suite"] = [
            {"name": name, "shards": [shard], "shift": "id" if name == "val" else "near"}
            for name, shard in suite.items()
        ]
        return Config.model_validate(values)

    told = evaluate_all({"plain": config("single", {"val": plain})})["plain"]["told"]
    assert len(told) == len(TEST)
    suite = {
        "val": str(scored_shard(tmp_path / "val-000000.tar", TEST, told)),
        "few": str(scored_shard(tmp_path / "few-000000.tar", TEST[:SINGLE], told)),
    }
    hold_out = {"fraction": 0.4, "seed": 0}
    alone = evaluate_all({"scored": config("single", suite, hold_out=hold_out)})["scored"]
    results = run_ranks(ranks, tmp_path / "ranks", evaluate_all, {"scored": config(backend, suite, hold_out=hold_out)})
    sets = alone["suite"]["sets"]
    expected = [1.0, 0.9, 0.6, 0.3, 1.0, 0.9, 0.6]
    assert sets["val"]["accuracy"] == pytest.approx(sum(expected) / 7) and sets["val"]["samples"] == 7
    assert sets["few"]["accuracy"] == pytest.approx(2.5 / 3) and 0 < sets["validation"]["samples"] < len(TRAIN)
    for rank in results:
        found = rank["scored"]["suite"]
        assert list(found["sets"]) == ["val", "few", "validation"]
        for name, one in found["sets"].items():
            assert one["samples"] == sets[name]["samples"], name
            for key in ("accuracy", "standard_error"):  # the same scores, added up in another order
                assert one[key] == pytest.approx(sets[name][key], rel=1e-12, abs=1e-15), (name, key)
            assert one["class_accuracy"] == pytest.approx(sets[name]["class_accuracy"], rel=1e-12)
        assert found == results[0]["scored"]["suite"], "ranks disagree"
    shares = [set(rank["scored"]["told"]) for rank in results]
    assert set.union(*shares) >= set(told) and all(share != shares[0] for share in shares[1:])
