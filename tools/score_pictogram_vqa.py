"""Accuracy of a VLM on sets of Pictogram-VQA by question type, beside what is right without looking.

    python tools/score_pictogram_vqa.py --model FOLDER --sets FOLDER [--names id colour-styles] [--samples 300]

Plain transformers: greedy answers, right if they are the one right answer. The prior's answer to a question type is the
most frequent one in the training set (``train-*.tar`` in the same folder). "Blind" is what the question alone gives to who knows
the very set: the answer that is most often right there for its type, its form (with a place or without) and its noun (all things,
or those of a class). The row "unseen" leaves out "what", which is asked about concepts that training saw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import digrap_scale.models.towers  # noqa: F401  (makes the image tower known to transformers)
from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo import scenes

MAX_NEW_TOKENS = 8


class Answerer:
    """A VLM that answers questions about images, greedily."""

    batch_samples = 50

    def __init__(self, folder: Path) -> None:
        """Load model and processor from ``folder``."""
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def prompt(self, question: str) -> str:
        """The question in the model's own turns, with a place for the image."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def answers(self, samples: list[dict[str, Any]]) -> list[str]:
        """The answer to each sample (``image``, ``meta`` with a ``question``)."""
        inputs = self.processor(
            images=[sample["image"] for sample in samples],
            text=[self.prompt(sample["meta"]["question"]) for sample in samples],
            padding=True,
            return_tensors="pt",
        )
        ids = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def score(answerer: Answerer, samples: Iterable[dict[str, Any]], prior: dict[str, str]) -> dict[str, dict[str, float]]:
    """Question type (and "all", "unseen") → number of samples, right answers, and right ones of the prior and blind."""
    table: dict[str, dict[str, float]] = {}
    told: dict[tuple[str, bool, bool], Counter[str]] = {}
    stream = iter(samples)
    while batch := list(itertools.islice(stream, answerer.batch_samples)):
        for sample, answer in zip(batch, answerer.answers(batch), strict=True):
            kind, right = sample["meta"]["question_type"], sample["meta"]["answers"][0]
            question = sample["meta"]["question"]
            form = any(cell in question for cell in scenes.CELLS), scenes.THINGS in question
            told.setdefault((kind, *form), Counter())[right] += 1
            for row in _rows(kind):
                counts = table.setdefault(row, {"samples": 0, "right": 0, "prior": 0, "blind": 0})
                counts["samples"] += 1
                counts["right"] += answer == right
                counts["prior"] += prior.get(kind) == right
    for (kind, *_), answers in told.items():
        for row in _rows(kind):
            table[row]["blind"] += max(answers.values())
    return table


def _rows(kind: str) -> tuple[str, ...]:
    return (kind, "all") if kind == "what" else (kind, "all", "unseen")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--sets", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--names", nargs="+", help="sets to score (default: all but the training set)")
    parser.add_argument("--samples", type=int, default=None, help="of each set, the first ones (default: all)")
    parser.add_argument("--json", type=Path, help="write the counts here, too")
    options = parser.parse_args(arguments)
    found = sorted(path.name.removesuffix(".manifest.json") for path in options.sets.glob("*.manifest.json"))
    names = options.names or [name for name in found if name not in ("train", "pretraining")]
    prior = vqa.prior_answers(options.sets)
    answerer = Answerer(options.model)
    results = {}
    print("| set | question type | samples | accuracy | prior | blind |\n|---|---|--:|--:|--:|--:|")
    for name in names:
        table = score(answerer, itertools.islice(vqa.read_set(options.sets, name), options.samples), prior)
        results[name] = table
        for kind, row in table.items():
            share = 100 / row["samples"]
            print(
                f"| {name} | {kind} | {row['samples']:.0f} | {row['right'] * share:.1f} | {row['prior'] * share:.1f} | "
                f"{row['blind'] * share:.1f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
