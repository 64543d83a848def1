"""Generative models of every family on sharded weights, against one process.

Batches are mixed: a rank whose samples have no image, ranks whose samples have several; test samples do not divide evenly,
and answers end at different lengths. None of it may hang (the time limit) or change a result.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from digrap_scale.config.schema import Config
from digrap_scale.models.families import build_family
from digrap_scale.models.processors import load_processor
from tests.data.vqa_samples import vqa_shard
from tests.distributed.ranks import run_ranks
from tests.distributed.vqa_runs import TEST, TRAIN, merged_answers, run_all_vqa, vqa_config
from tests.models.tiny_vlm import MAKERS, save_tiny_vlm

QUICK = ("llava", "paligemma")
REST = tuple(kind for kind in MAKERS if kind not in QUICK)
CASES = [
    pytest.param(("fsdp2", 2, QUICK), id="fsdp2-2"),
    pytest.param(("zero3", 3, QUICK), id="zero3-3"),
    *(
        pytest.param((backend, ranks, kinds), id=f"{backend}-{ranks}-{name}", marks=pytest.mark.slow)
        for name, kinds in (("rest", REST), ("quick", QUICK))
        for backend, ranks in (("fsdp2", 2), ("zero3", 2), ("fsdp2", 3), ("zero3", 3))
        if (name, backend, ranks) not in (("quick", "fsdp2", 2), ("quick", "zero3", 3))
    ),
    pytest.param(("ddp", 2, QUICK), id="ddp-2", marks=pytest.mark.slow),
    pytest.param(("zero2", 2, QUICK), id="zero2-2", marks=pytest.mark.slow),
]
Ran = tuple[tuple[str, ...], list[dict[str, Any]], Path]
pytestmark = pytest.mark.timeout(900)


def configs(folder: Path, kinds: tuple[str, ...], backend: str, where: str, **model: Any) -> dict[str, Config]:
    train, test = vqa_shard(folder / "train-000000.tar", TRAIN), vqa_shard(folder / "test-000000.tar", TEST)
    for kind in kinds:
        if not (folder / kind).exists():
            save_tiny_vlm(kind, folder / kind)
    return {
        kind: vqa_config(str(folder / kind), backend, str(folder / where / kind), str(train), str(test), **model)
        for kind in kinds
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vqa")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One process, made when it is asked for."""

    class Made(dict[str, Any]):
        def __missing__(self, kind: str) -> Any:
            self[kind] = run_all_vqa(configs(folder, (kind,), "single", "single"))[kind]
            return self[kind]

    return Made()


@pytest.fixture(scope="module", params=CASES)
def ran(request: pytest.FixtureRequest, folder: Path) -> Ran:
    backend, ranks, kinds = request.param
    where = f"{backend}-{ranks}"
    return (
        kinds,
        run_ranks(ranks, folder / f"ranks-{where}", run_all_vqa, configs(folder, kinds, backend, where)),
        (folder / where),
    )


def test_training_equals_one_process(ran: Ran, alone: dict[str, Any]) -> None:
    kinds, results, where = ran
    for kind in kinds:
        got, expected = results[0][kind], alone[kind]
        assert got["losses"] == pytest.approx(expected["losses"], rel=2e-4), kind
        assert got["losses"][1] < got["losses"][0]
        assert got["report"]["grad_norm"] == pytest.approx(expected["report"]["grad_norm"], rel=1e-3)
        assert set(got["weights"]) == set(expected["weights"])
        start = AutoModelForImageTextToText.from_pretrained(where.parent / kind).state_dict()
        moved = 0.0
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                got["weights"][name], weight, atol=2e-5, rtol=1e-5, msg=lambda m, n=name, k=kind: f"{k} {n}: {m}"
            )
            moved = max(moved, float((weight - start[name]).abs().max()))
        assert moved > 1e-4, "nothing was trained"


def test_answers_equal_one_process(ran: Ran, alone: dict[str, Any]) -> None:
    kinds, results, _ = ran
    for kind in kinds:
        assert merged_answers(results, kind) == alone[kind]["answers"], kind
        assert len(alone[kind]["answers"]) == len(TEST)
        lengths = [{len(ids) for ids in rank[kind]["answers"].values()} for rank in results]
        assert len(set.union(*lengths)) > 1, f"{kind}: all answers of one length show nothing"


def test_plain_transformers_opens_what_was_saved(ran: Ran) -> None:
    """The weights, to the bit; the processor, as it was; and the same logits."""
    kinds, results, where = ran
    for kind in kinds:
        final = where / kind / "final"
        model: Any = AutoModelForImageTextToText.from_pretrained(final).eval()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, results[0][kind]["weights"][name]), name
        family = build_family(model.config, load_processor(final, AutoConfig.from_pretrained(final), False), final)
        original = load_processor(where.parent / kind, model.config, False)
        assert family.tokenizer.get_vocab() == original.tokenizer.get_vocab()
        for rank in results:
            inputs, mask = rank[kind]["inputs"], rank[kind]["inputs"]["attention_mask"].bool()
            with torch.no_grad():
                logits = model(**inputs).logits
            torch.testing.assert_close(logits[mask], rank[kind]["logits"][mask], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_bfloat16(backend: str, folder: Path) -> None:
    """Computing in bfloat16, every family trains, generates and is saved in its own dtype."""
    where = f"{backend}-bfloat16"
    runs = configs(folder, tuple(MAKERS), backend, where, precision="bfloat16")
    for rank in run_ranks(2, folder / f"ranks-{where}", run_all_vqa, runs):
        for kind, got in rank.items():
            assert all(math.isfinite(loss) for loss in got["losses"]) and not got["report"]["skipped"], kind
            assert all(weight.dtype == torch.float32 for weight in got["weights"].values()), kind
            assert got["answers"]
