"""tools/make_gemma_vlm.py, with a small random Gemma 3 in place of the one it fetches; and the config that fine-tunes it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

from digrap_scale.config.load import parse_config
from digrap_scale.models.adapters import add_lora
from digrap_scale.models.check import check_model
from digrap_scale.models.families import build_family
from digrap_scale.models.processors import load_processor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import make_gemma_vlm as tool  # noqa: E402
import pictogram_vlm as vlm  # noqa: E402

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def letters() -> PreTrainedTokenizerFast:
    """A token for each character, and for a space: a word behind a space has one piece more than it has letters."""
    characters = sorted({letter for word in vlm.vocabulary() for letter in word} | {"\u2581"})
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *characters])}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=len(letters()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=512,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(gemma: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool writes."""
    out = tmp_path_factory.mktemp("gemma") / "start"
    patch = pytest.MonkeyPatch()
    with patch.context() as here:
        here.setattr(tool, "fetch", lambda packages: Path("nowhere/gemma.gguf"))
        here.setattr(tool, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: letters()))
        here.setattr(tool, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: gemma))
        assert tool.main(["--out", str(out)]) == 0
    return out


def test_a_words_row_is_the_mean_of_its_pieces(gemma: Gemma3ForCausalLM) -> None:
    tokenizer, embeddings = letters(), gemma.get_input_embeddings().weight.detach()
    rows = dict(zip(vlm.vocabulary(), tool.pruned_rows(embeddings, tokenizer), strict=True))

    def of(*pieces: str) -> torch.Tensor:
        return embeddings[tokenizer.convert_tokens_to_ids(list(pieces))].mean(dim=0)

    torch.testing.assert_close(rows["red"], of("\u2581", "r", "e", "d"))
    torch.testing.assert_close(rows["?"], of("?"))  # a mark stands behind a word, not behind a space
    for ours, theirs in {
        "<pad>": "<pad>",
        "<s>": "<bos>",
        "</s>": "<eos>",
        "<unk>": "<unk>",
        "<image>": "<unk>",
    }.items():
        assert torch.equal(rows[ours], embeddings[tokenizer.convert_tokens_to_ids(theirs)]), ours


def test_a_word_without_pieces_is_told(gemma: Gemma3ForCausalLM) -> None:
    class Empty:
        def convert_tokens_to_ids(self, token: str) -> int:
            return 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
            return {"input_ids": []}

    with pytest.raises(RuntimeError, match="Gemma's tokenizer has no piece for it"):
        tool.pruned_rows(gemma.get_input_embeddings().weight, Empty())


def test_the_model_is_made_of_both(folder: Path, gemma: Gemma3ForCausalLM) -> None:
    """Gemma's layers and the small VLM's tower, to the bit; it answers, and opens by itself."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    language = model.model.language_model.state_dict()
    kept = {name: tensor for name, tensor in gemma.model.state_dict().items() if name != "embed_tokens.weight"}
    assert set(language) == {*kept, "embed_tokens.weight"} and len(kept) > 20
    assert all(torch.equal(language[name], tensor) for name, tensor in kept.items())
    rows = tool.pruned_rows(gemma.get_input_embeddings().weight.detach(), letters())
    assert torch.equal(language["embed_tokens.weight"], rows)
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr(), "tied"
    trained: Any = AutoModelForImageTextToText.from_pretrained(tool.VISION, dtype=torch.float32)
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], tensor) for name, tensor in trained.model.vision_tower.state_dict().items())
    config = AutoConfig.from_pretrained(folder)
    family = build_family(config, load_processor(folder, config, False), folder)
    assert family.end == "</s>" and config.get_text_config().eos_token_id == family.end_ids[0]
    row = family.encode("what is at the top left ?", [], "red")
    with torch.no_grad():
        assert torch.isfinite(model(**family.join([row], left=False)).logits).all()


def test_the_shipped_config_fits_it(folder: Path) -> None:
    """Every regex meets names; LoRA sits on all seven projections of each of Gemma's layers, and nowhere else."""
    path = REPOSITORY / "configs" / "pictogram_gemma_lora.yaml"
    config = parse_config(path.read_text(), path.name)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    assert check_model(config) == []
    assert config.model.lora is not None
    with torch.device("meta"):
        model = add_lora(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)), config.model.lora)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 7 * 2 and all(".language_model.layers." in name for name in adapted)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training and all(".lora_" in name or "multi_modal_projector" in name for name in training)
    assert any("multi_modal_projector" in name for name in training)
