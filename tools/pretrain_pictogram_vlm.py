"""The whole recipe of the small VLM: train, keep, score.

    python tools/pretrain_pictogram_vlm.py [--packages runs/packages] [--out FOLDER] [--from keep]

Needs npm and resvg-py, and a registry for the first run. Training is ``tools/align_pictogram_vlm.py``. Paths lie under
``runs/pictogram_vlm``. ``--from keep`` starts at a later step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import align_pictogram_vlm as align
import pictogram_vlm as vlm
import teach_pictogram_styles as teach
from pretrain_foundation import ROOT, run_python

import digrap_scale.models.towers  # noqa: F401  (makes the image tower known to transformers)

WORK = Path("runs/pictogram_vlm")
ASSETS = Path("digrap_scale/demo/assets")
STEPS = ("align", "keep", "score")
PACKAGES = ("torch", "transformers", "tokenizers", "webdataset", "pillow", "resvg_py")
SETTINGS = (
    (
        teach,
        "STYLE_STEPS STYLE_TILES TOWER_LEARNING_RATE HEAD_LEARNING_RATE TOWER_WEIGHT_DECAY LABEL_SMOOTHING HEAD_DROPOUT "
        "KEEP_WEIGHT".split(),
    ),
    (
        align,
        "SEED VARIANTS FEATURE_DROPOUT WORD_STEPS WORD_TILES CELL_SHARE BATCH_PAGES LEARNING_RATE BETAS WEIGHT_DECAY "
        "WARMUP_STEPS MAX_GRAD_NORM CAPTION_SHARE ASKED".split(),
    ),
)
WEIGHTS_FILE = "model.safetensors"
SCORED_SAMPLES, BALANCED_SAMPLES = 200, 1000
# The sets that tell of pre-training: name → whether its style was seen. First those whose answers are as balanced as its own.
SCORED = {
    "balanced-colour-styles": "seen",
    "balanced-high-contrast": "unseen",
    "balanced-monotone": "unseen",
    "balanced-openmoji": "unseen",
    "colour-styles": "seen",
    "older-styles": "seen",
    "id": "unseen (high contrast)",
    "other-line-style": "unseen (monotone)",
    "outlined-style": "unseen (openmoji)",
    "reworded": "unseen (high contrast), reworded questions",
    "colour-reworded": "seen, reworded questions",
    "photos": "photographs",
    "easy-vqa": "easy-vqa",
}


def keep(trained: Path, out: Path) -> None:
    """Write the ``trained`` model into ``out``: parameters in bfloat16, BatchNorm's statistics in float32.

    Raises:
        SystemExit: it has no weights.
    """
    if not (trained / WEIGHTS_FILE).exists():
        raise SystemExit(f"error: {trained / WEIGHTS_FILE}: not found; let the training before finish first")
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(out)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = "float32"  # computed in float32; only the file is smaller
    model.config.save_pretrained(out)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner alone
    vlm.make_processor().save_pretrained(out)


def recipe(out: Path, scores: dict[str, Any], log: list[str]) -> str:
    """RECIPE.md: what was done, versions, hash, accuracy, and lines of the log."""
    digest = hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest()
    versions = "\n".join(f"- {name} {version(name)}" for name in PACKAGES)
    size = (out / WEIGHTS_FILE).stat().st_size
    parameters = sum(weight.numel() for weight in AutoModelForImageTextToText.from_pretrained(out).parameters())
    log_lines, steps = "\n".join(picked(log, 16)), json.loads(log[-1])["step"]
    settings = "\n".join(f"- `{name}` {getattr(module, name)}" for module, names in SETTINGS for name in names)
    return f"""# How this model was made

A LLaVA (`LlavaForConditionalGeneration` of transformers) of {parameters / 1e6:.1f} M parameters: the EfficientNet-Lite0
image tower of the foundation model beside it (`../foundation`), LLaVA's two-layer projector, and a Llama of
{vlm.LANGUAGE_MODEL["num_hidden_layers"]} layers, {vlm.LANGUAGE_MODEL["hidden_size"]} wide, with tied embeddings of
{len(vlm.vocabulary())} words. A page of 128 × 128 pixels gives {vlm.IMAGE_TOKENS} image tokens.

Pre-training (`tools/align_pictogram_vlm.py`), on pages of one to four pictograms (`docs/pictogram_vqa.md`) in the styles
noto, noto-v1, twemoji, fluent-emoji, fluent-emoji-flat and emojione; training
concepts only.

1. styles: the tower learns that a drawing turned into another style (other colours, greys, outlines, two tones) is one of the
   same thing; then it stays as it is, and its tokens of every tile are computed once;
2. words: the projector's tokens of a tile are made to read as the words of its name, class and cell;
3. dialogues: projector and language model, on questions of every form and captions.

`fluent-emoji-high-contrast` (the style that the demo fine-tunes on), `emojione-monotone` and `openmoji` were never seen,
nor were the held-out concepts in any style.

One command, from the repository's root (npm fetches the pictograms):

    python tools/pretrain_pictogram_vlm.py

Weights are stored in bfloat16, BatchNorm's running statistics in float32; {size / 1e6:.1f} MB.

`{WEIGHTS_FILE}` SHA-256: `{digest}`

## Versions

{versions}

## Accuracy

Greedy answers, exact match, {BALANCED_SAMPLES} samples in a balanced set, {SCORED_SAMPLES} in the others. "what" is asked
about training concepts in new pages, all else ("unseen" together) about held-out concepts. In brackets what is right
without looking: in the balanced sets, whose answers are drawn as pre-training's are, by who knows which answer is most often
right in the very set for a question's type, form and noun; elsewhere by the most frequent answer in the fine-tuning set,
whose skew pre-training cannot know.

The ways of restyling and the numbers of steps were chosen in three trials of the first phase by the class of held-out
concepts in the styles that are tested here; nothing else was chosen by these sets, and no drawing of these styles was
trained on.

{accuracy_table(scores)}

## Settings

AdamW, linear warm-up and cosine; one process.

{settings}
- steps of dialogues: {steps}

## From the log

```
{log_lines}
```
"""


def picked(lines: list[str], count: int) -> list[str]:
    """``count`` lines, spread evenly, the first and the last among them."""
    if len(lines) <= count:
        return lines
    return [lines[round(index * (len(lines) - 1) / (count - 1))] for index in range(count)]


def accuracy_table(scores: dict[str, Any]) -> str:
    """Markdown: a row a set, "accuracy (without looking)" in per cent for each question type."""
    kinds = ("what", "where", "how many", "yes/no", "category", "unseen", "all")
    lines = ["| set | style | " + " | ".join(kinds) + " |", "|---|---|" + "--:|" * len(kinds)]
    for name, style in SCORED.items():
        if name not in scores:
            continue
        cells = []
        for kind in kinds:
            row = scores[name].get(kind)
            share = 100 / row["samples"] if row else 0
            blind = "blind" if name.startswith("balanced") else "prior"
            cells.append(f"{row['right'] * share:.1f} ({row[blind] * share:.1f})" if row else "–")
        lines.append(f"| {name} | {style} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where fetched packages are kept")
    parser.add_argument("--out", type=Path, default=ASSETS / "pictogram_vlm", help="folder to write")
    parser.add_argument("--from", dest="first", choices=STEPS, default=STEPS[0], help="step to start at")
    options = parser.parse_args(arguments)
    packages, out = str(options.packages.resolve()), options.out.resolve()
    steps = STEPS[STEPS.index(options.first) :]
    make = "tools/make_pictogram_vqa.py"
    if "align" in steps:
        paths = ("--foundation", str(ASSETS / "foundation"), "--packages", packages, "--out", f"{WORK}/trained")
        run_python("tools/align_pictogram_vlm.py", *paths)
    if "keep" in steps:
        keep(ROOT / WORK / "trained", out)
        run_python(make, "shipped", "--packages", packages)  # what this model answers wrongly
    sets, scores = f"{WORK}/sets", f"{WORK}/scores.json"
    samples = ("--samples", str(SCORED_SAMPLES))
    run_python(make, "sets", "--packages", packages, "--out", sets, "--train-samples", "2000", *samples)
    run_python(make, "balanced", "--packages", packages, "--out", sets, "--samples", str(BALANCED_SAMPLES))
    run_python(make, "far", "--packages", packages, "--out", sets, *samples)
    told = ("--model", str(out), "--sets", sets, "--json", scores, "--names", *SCORED)
    run_python("tools/score_pictogram_vqa.py", *told)
    log = (ROOT / WORK / "trained" / "align.jsonl").read_text(encoding="utf-8").splitlines()
    table = json.loads((ROOT / scores).read_text(encoding="utf-8"))
    (out / "RECIPE.md").write_text(recipe(out, table, log), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
