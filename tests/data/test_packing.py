"""Several samples in a row give the loss and the gradients of a row for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from digrap_scale.errors import ConfigError
from digrap_scale.models.families import build_family
from digrap_scale.models.families.packing import PACKABLE_LANGUAGE_MODELS, PACKABLE_MODELS, check_packable, first_fit
from digrap_scale.models.processors import load_processor
from digrap_scale.types import IGNORED
from tests.data.test_vqa import SAMPLES, sample, task_of
from tests.models.tiny_vlm import save_tiny_vlm

LONG = sample(
    "3", 1, question="what colour is the picture in this picture , red or blue ?", answers=["a red fire engine"]
)
MIXED = [*SAMPLES, LONG, sample("4", 1, color=50, question="how many ?", answers=["two"])]
ONLY_TEXT = [SAMPLES[2], sample("5", 0, question="is this the answer ?", answers=["yes yes"])]


def float32_grads(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums of other lengths round otherwise: small elements of a tensor by what its large ones round by.
        atol = max(1e-6, 2e-5 * float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("kind", "attention"), [*((kind, "sdpa") for kind in PACKABLE_MODELS), ("llava", "eager"), ("smolvlm", "eager")]
)
def test_packed_is_unpacked(kind: str, attention: str, tmp_path: Path) -> None:
    """One image, two, none, in one batch; a batch of text alone; keeps_logits or not."""
    folder = save_tiny_vlm(kind, tmp_path / kind)
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).train()
    check_packable(model.config)
    plain = task_of(family, tmp_path, "vqa", True)
    longest = max(len(plain._encoded(s, s["meta"]["answers"])) for s in MIXED)
    for samples, keeps in ((MIXED, False), (MIXED, True), (ONLY_TEXT, False)):
        family.keeps_logits = keeps
        unpacked = plain.collate(samples)
        for row_tokens in (longest, 8 * longest):
            packed = task_of(family, tmp_path, "vqa", True, data={"pack_tokens": row_tokens}).collate(samples)
            assert len(packed.inputs["input_ids"]) < len(unpacked.inputs["input_ids"]), "no two samples share a row"
            assert packed.keys == unpacked.keys and packed.inputs["input_ids"].shape[1] <= max(row_tokens, longest)
            expected, found = plain.loss(model, unpacked), plain.loss(model, packed)
            assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
            assert_same_grads(float32_grads(model, found), float32_grads(model, expected))


@pytest.mark.parametrize("kind", PACKABLE_LANGUAGE_MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_language_models_tell_samples_apart(kind: str, attention: str) -> None:
    """Logits of each sample in a row are its own; a sliding window is counted within a sample."""
    window = {"sliding_window": 4} if kind == "mistral" else {}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(kind, vocab_size=30, num_hidden_layers=2, **sizes, **window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    lengths = [5, 9, 3]
    ids = torch.randint(30, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    start = 0
    for length in lengths:
        alone = model(input_ids=ids[:, start : start + length], use_cache=False).logits
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-5, atol=1e-6)
        start += length


def test_padding_counts_nowhere(tmp_path: Path) -> None:
    folder = save_tiny_vlm("llava", tmp_path / "llava")
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    task = task_of(family, tmp_path, "vqa", True, data={"pack_tokens": 100})
    for keeps in (False, True):
        family.keeps_logits = keeps
        batch = task.padding(MIXED[0])
        assert batch.keys == [] and int((batch.inputs["labels"] != IGNORED).sum()) == 0
        loss = task.loss(model, batch)
        gradients = float32_grads(model, loss)
        assert float(loss.detach()) == 0.0 and gradients
        assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())
    with pytest.raises(ConfigError, match=r"x.tar: sample 3: \d+ tokens .* limit 12; .*data.pack_tokens"):
        task_of(family, tmp_path, "vqa", True, data={"pack_tokens": 12}).collate([LONG])
    assert "sample_ids" not in task_of(family, tmp_path, "vqa", False, data={"pack_tokens": 100}).collate(MIXED).inputs


@pytest.mark.parametrize("kind", ["paligemma", "qwen2_5_vl", "qwen3_vl"])
def test_models_that_cannot_are_refused(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save_tiny_vlm(kind, tmp_path / kind))
    with pytest.raises(ConfigError, match=f"data.pack_tokens: expected a model of idefics3, .*, found {kind}; remove"):
        check_packable(config)


def test_language_models_and_attentions_that_cannot_are_refused(tmp_path: Path) -> None:
    config: PreTrainedConfig = AutoConfig.from_pretrained(save_tiny_vlm("llava", tmp_path))
    check_packable(config)
    config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="expected an attention of eager, sdpa, found flash_attention_2"):
        check_packable(config)
    config.text_config = AutoConfig.for_model("gemma")
    with pytest.raises(ConfigError, match="expected a language model of llama, .*, found gemma"):
        check_packable(config)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 100))
def test_every_sample_has_its_place(lengths: list[int], room: int) -> None:
    rows = first_fit(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room and row == sorted(row) for row in rows)
    # No two rows would fit one: otherwise a row was opened although another had room.
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > room


@pytest.mark.parametrize(
    "data", [{"max_forward_images": 2}, {"max_forward_tokens": 80}, {"max_forward_tokens": 80, "pack_tokens": 40}]
)
def test_budgets_cut_a_micro_batch(data: dict[str, Any], tmp_path: Path) -> None:
    """Into consecutive parts, as long as may be, none of which exceeds the budget."""
    folder = save_tiny_vlm("llava", tmp_path / "llava")
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    task = task_of(family, tmp_path, "vqa", True, data=data)
    batch = task.micro_batch(MIXED * 2)
    parts = [batch, *batch.rest]
    assert len(parts) > 1 and [key for part in parts for key in part.keys] == [s["key"] for s in MIXED * 2]
    images = {one["key"]: len(one["images"]) for one in MIXED}
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert part.inputs["input_ids"].numel() <= data.get("max_forward_tokens", 10**9)
        assert sum(images[key] for key in part.keys) <= data.get("max_forward_images", 10**9)
        if following is not None:  # one sample more would have been too many
            more = [one for key in [*part.keys, following.keys[0]] for one in MIXED if one["key"] == key]
            assert len(task.micro_batch(more).rest) == 1
    assert not task_of(family, tmp_path, "vqa", False, data=data).micro_batch(MIXED * 2).rest


def test_a_sample_over_the_budget_is_named(tmp_path: Path) -> None:
    folder = save_tiny_vlm("llava", tmp_path / "llava")
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    task = task_of(family, tmp_path, "vqa", True, data={"max_forward_images": 1})
    with pytest.raises(
        ConfigError, match=r"x.tar: sample 1: a forward of it alone has \d+ tokens and 2 image\(s\), .*"
    ):
        task.micro_batch(SAMPLES)
