"""Make Pictogram-VQA's shards from the pictogram packages (``docs/pictogram_vqa.md``).

    python tools/make_pictogram_vqa.py sets --out FOLDER             # training, validation, ID and near sets
    python tools/make_pictogram_vqa.py far --out FOLDER              # photographs and easy-vqa
    python tools/make_pictogram_vqa.py balanced --out FOLDER         # four styles, balanced answers: to score pre-training
    python tools/make_pictogram_vqa.py pretraining --out FOLDER      # captions and questions for the small VLM
    python tools/make_pictogram_vqa.py adversarial --model FOLDER --out FOLDER   # what that model answers wrongly
    python tools/make_pictogram_vqa.py shipped                       # the demo's assets: easy-vqa, adversarial.json

Packages are fetched once (``--packages``) through npm, pip and apt, and checked against their pinned hashes. Equal
packages, resvg-py and Pillow give equal bytes; a set's manifest holds the SHA-256 of each shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictogram_tiles as tiles_of
import pictogram_vqa_far as far
import pictograms as pg
from pictogram_styles import vary

from digrap_scale.data.shards import write_shards
from digrap_scale.demo import pictogram_vqa as vqa
from digrap_scale.demo import scenes
from digrap_scale.errors import DigrapError

TRAIN_SAMPLES, TEST_SAMPLES, FAR_SAMPLES, CANDIDATES = 10_000, 1_000, 1_000, 4_000
PRETRAINING_SAMPLES = 10_000
CAPTION_SHARE = 0.4  # of the pre-training samples
SHIPPED_FAR, SHIPPED_CANDIDATES = 150, 600
ASSETS = Path(__file__).resolve().parents[1] / "digrap_scale" / "demo" / "assets"
# Styles that are fetched and not kept here join the near sets.
OUTLINED = vqa.SetSpec("outlined style", ("openmoji",), modality="vision")
PHOTOS = vqa.SetSpec("photos", ("photos",), shift="far", modality="other")
# What pre-training is measured by: its own answers are balanced, those of the sets above have the fine-tuning set's skew.
BALANCED = tuple(
    vqa.SetSpec(f"balanced {name}", styles, prior="balanced", draws="balanced")
    for name, styles in (
        ("colour styles", vqa.COLOUR_STYLES),
        ("high contrast", (vqa.SOURCE,)),
        ("monotone", ("emojione-monotone",)),
        ("openmoji", ("openmoji",)),
    )
)


def load_tiles(
    styles: tuple[str, ...], packages: Path
) -> tuple[dict[str, dict[str, dict[str, Image.Image]]], dict[str, str]]:
    """Tiles (style → part → concept → image) rendered from the packages, and labels (concept → class)."""
    split = pg.make_split()
    tiles: dict[str, dict[str, dict[str, Image.Image]]] = {}
    for style in styles:
        drawn = tiles_of.render_tiles(style, packages, set(split.label))
        tiles[style] = {
            part: {concept: tile for concept, tile in drawn.items() if (concept in split.test) == (part == "test")}
            for part in vqa.PARTS
        }
    return tiles, dict(split.label)


def make_sets(out: Path, packages: Path, train_samples: int, test_samples: int) -> None:
    """Training, validation, ID and near sets, but for the adversarial one."""
    write(out, packages, (vqa.TRAIN, vqa.VALIDATION, *vqa.TESTS, OUTLINED), train_samples, test_samples)


def write(out: Path, packages: Path, specs: tuple[vqa.SetSpec, ...], train_samples: int, test_samples: int) -> None:
    """The sets of ``specs``, drawn from the packages."""
    styles = tuple(dict.fromkeys(style for spec in specs for style in spec.styles))
    tiles, label = load_tiles(styles, packages)
    for spec in specs:
        count = train_samples if spec is vqa.TRAIN else test_samples
        report(vqa.prefix(spec), vqa.write_set(spec, tiles, label, out, range(count)))


def make_far(out: Path, packages: Path, samples: int) -> None:
    """Photographs composed into scenes, and easy-vqa."""
    drawn, label = far.photographs(packages)
    report("photos", vqa.write_set(PHOTOS, {"photos": {"test": drawn}}, label, out, range(samples)))
    shards = write_shards(
        far.easy_vqa(packages, samples), out, prefix="easy-vqa", samples_per_shard=vqa.SAMPLES_PER_SHARD
    )
    report("easy-vqa", shards)


def make_pretraining(out: Path, packages: Path, samples: int) -> None:
    """Pages of training concepts in the alignment styles, mixed in half of the pages, with a caption or a question."""
    tiles, label = load_tiles(pg.ALIGNMENT_STYLES, packages)
    drawn = {style: tiles[style]["train"] for style in pg.ALIGNMENT_STYLES}
    manifest = write_shards(
        pretraining_samples(drawn, label, samples), out, prefix="pretraining", samples_per_shard=vqa.SAMPLES_PER_SHARD
    )
    report("pretraining", manifest)


def pretraining_samples(
    drawn: dict[str, dict[str, Image.Image]], label: dict[str, str], samples: int
) -> Iterator[dict[str, Any]]:
    """The samples of ``make_pretraining``, each from its number alone.

    Args:
        drawn: style → concept → tile.
        label: concept → class.
        samples: how many.
    """
    concepts = {style: vqa.by_class(drawn[style], label) for style in drawn}
    for index in range(samples):
        rng = random.Random(f"{vqa.SEED}/pretraining/{index}")
        style = rng.choice(sorted(drawn))
        if rng.random() < CAPTION_SHARE:
            what = rng.choice(sorted(scenes.CAPTIONS))
            scene = scenes.draw_scene(rng, concepts[style])
            kind, text, answer = "caption", scenes.CAPTIONS[what], scenes.describe(scene, label, what)
        else:
            kind = rng.choice(scenes.QUESTION_TYPES)
            scene, question = scenes.draw_question(rng, kind, "balanced", concepts[style])
            wordings = [*scenes.WORDINGS["standard"][question.form], *scenes.WORDINGS["varied"][question.form]]
            text, answer = scenes.word(question, rng.choice(wordings)), question.answer
        mixed = rng.random() < 0.5

        def tile(concept: str, rng: random.Random = rng, style: str = style, mixed: bool = mixed) -> Image.Image:
            drawing = [name for name in sorted(drawn) if concept in drawn[name]] if mixed else [style]
            return vary(drawn[rng.choice(drawing)][concept], rng)

        meta = {"question": text, "answers": [answer], "question_type": kind, "concepts": list(scene)}
        image = scenes.encode(scenes.compose(rng, scene, tile))
        yield {"key": f"pretraining-{index:06d}", "image": image, "extension": "webp", "meta": meta}


def make_adversarial(out: Path, packages: Path, model: Path, candidates: int, keep: int) -> None:
    """The first ``keep`` of the candidates that ``model`` answers wrongly, as shards."""
    tiles, label = load_tiles(vqa.ADVERSARIAL.styles, packages)
    indices = failures(tiles, label, model, candidates)[:keep]
    report("adversarial", vqa.write_set(vqa.ADVERSARIAL, tiles, label, out, indices))


def failures(tiles: vqa.Tiles, label: dict[str, str], model: Path, candidates: int) -> list[int]:
    """Numbers of the candidates whose greedy answer is not the right one."""
    from score_pictogram_vqa import Answerer

    answerer = Answerer(model)
    wrong = []
    for start in range(0, candidates, answerer.batch_samples):
        indices = range(start, min(start + answerer.batch_samples, candidates))
        batch = [vqa.decoded(sample) for sample in vqa.samples(vqa.ADVERSARIAL, tiles, label, indices)]
        answers = answerer.answers(batch)
        wrong += [
            index
            for index, sample, answer in zip(indices, batch, answers, strict=True)
            if answer != sample["meta"]["answers"][0]
        ]
    return wrong


def make_shipped(out: Path, packages: Path) -> None:
    """What the demo cannot compose by itself: a part of easy-vqa, and the adversarial set's numbers.

    The candidates are composed from the shipped tiles, and asked of the shipped model.
    """
    samples = far.easy_vqa(packages, SHIPPED_FAR)
    report("easy-vqa", write_shards(samples, out, prefix="easy-vqa", samples_per_shard=vqa.SAMPLES_PER_SHARD))
    tiles, label = vqa.read_tiles(ASSETS / "pictograms")
    model = ASSETS / "pictogram_vlm"
    table: dict[str, Any] = {
        "model_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "candidates": SHIPPED_CANDIDATES,
        "indices": failures(tiles, label, model, SHIPPED_CANDIDATES),
    }
    (out / "adversarial.json").write_text(json.dumps(table) + "\n", encoding="utf-8")
    print(f"adversarial: {len(table['indices'])} of {SHIPPED_CANDIDATES} candidates")


def report(name: str, manifest: Any) -> None:
    """Print a line about a written set."""
    size = sum(entry.bytes for entry in manifest.shards)
    print(f"{name}: {manifest.samples} samples, {size / 1e6:.1f} MB in {len(manifest.shards)} shards", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sets", "far", "balanced", "pretraining", "adversarial", "shipped"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=name != "shipped", default=ASSETS / "pictogram_vqa")
        command.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where packages are kept")
        if name == "sets":
            command.add_argument("--train-samples", type=int, default=TRAIN_SAMPLES)
        if name == "adversarial":
            command.add_argument("--model", type=Path, required=True, help="folder of the base model")
            command.add_argument("--candidates", type=int, default=CANDIDATES)
        if name != "shipped":
            default = {"pretraining": PRETRAINING_SAMPLES, "far": FAR_SAMPLES}.get(name, TEST_SAMPLES)
            command.add_argument("--samples", type=int, default=default, help="of each set (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "sets":
            make_sets(options.out, options.packages, options.train_samples, options.samples)
        elif options.command == "balanced":
            write(options.out, options.packages, BALANCED, 0, options.samples)
        elif options.command == "far":
            make_far(options.out, options.packages, options.samples)
        elif options.command == "pretraining":
            make_pretraining(options.out, options.packages, options.samples)
        elif options.command == "adversarial":
            make_adversarial(options.out, options.packages, options.model, options.candidates, options.samples)
        else:
            make_shipped(options.out, options.packages)
    except DigrapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
