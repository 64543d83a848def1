"""The small VLM's pre-training: its image tower on styles, then projector and language model on top of it.

    python tools/align_pictogram_vlm.py --foundation FOLDER --packages FOLDER --out FOLDER [--steps 2000]

First the tower learns that a drawing in another style is one of the same thing (``teach_pictogram_styles.py``); then it stays
as it is. It reads a page's cells one by one (``window_pixels``), so it sees every pictogram of the training concepts, in
``VARIANTS`` variations a style, once; a page's image tokens are then put together from those of its four cells. The
projector learns to turn a tile's tokens into words, then it and the language model learn to answer: a page is asked
several questions, each as if it were the only one; the answers are supervised. Writes a Hugging Face folder and
``align.jsonl``.
"""

# B pages, V tiles, N tokens a cell, C channels, T text tokens

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pictogram_tiles as tiles
import pictogram_vlm as vlm
import pictograms as pg
from pictogram_styles import vary
from teach_pictogram_styles import teach_styles

from digrap_scale.demo import scenes
from digrap_scale.models.towers.token_tower import place_code

SEED = 0
VARIANTS = 8
FEATURE_DROPOUT = 0.3
# Words: the projector alone, tile by tile.
WORD_STEPS = 800
WORD_TILES = 128
CELL_SHARE = 0.2  # of a tile's words
# Dialogues: projector and language model.
BATCH_PAGES = 16
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 50
MAX_GRAD_NORM = 1.0
SAVE_STEPS = 50
LOG_STEPS = 25
CAPTION_SHARE = 0.5  # of the pages
# Form of question → how many about a page.
ASKED = {"what": 1, "where": 2, "how many": 2, "yes/no": 2, "yes/no cell": 1, "category": 1}
IGNORED = -100
CELL_SIDE = scenes.TILE // vlm.TOKEN_PIXELS  # tokens along a cell's side
GRID = vlm.PAGE // vlm.TOKEN_PIXELS
TOWER_CHANNELS = 1280
CELL_CODE = place_code(CELL_SIDE, CELL_SIDE, TOWER_CHANNELS)  # which the tower adds to a cell that is all of its image
PAGE_CODE = place_code(GRID, GRID, TOWER_CHANNELS)


class TileFeatures:
    """The frozen tower's tokens of every training pictogram.

    Attributes:
        tokens_VNC: bfloat16; the last tile is an empty cell.
        rows: (style, concept) → rows of ``tokens_VNC``.
        concepts: style → class → concepts.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, packages: Path) -> None:
        split = pg.make_split()
        train = set(split.label) - split.test
        rng = random.Random(SEED)
        images: list[pg.Image.Image] = []
        self.rows: dict[tuple[str, str], list[int]] = {}
        self.concepts: dict[str, dict[str, list[str]]] = {}
        for style in pg.ALIGNMENT_STYLES:
            drawn = tiles.render_tiles(style, packages, train)
            self.concepts[style] = tiles.concepts_of(split, "train", set(drawn))
            for concept, tile in drawn.items():
                for variant in range(VARIANTS):
                    cell: scenes.Scene = (concept, None, None, None)
                    varied = tile if variant == 0 else vary(tile, rng)
                    page = scenes.compose(rng, cell, {concept: varied}.__getitem__)
                    self.rows.setdefault((style, concept), []).append(len(images))
                    images.append(page.crop((0, 0, scenes.TILE, scenes.TILE)))
        images.append(pg.Image.new("RGB", (scenes.TILE, scenes.TILE), "white"))
        self.tokens_VNC = tile_tokens(model, processor, images)

    def page(self, rng: random.Random) -> tuple[scenes.Scene, list[int]]:
        """A scene and its four rows of tiles; half of the pages are of one style, half mix them."""
        styles = sorted(self.concepts)
        first = rng.choice(styles)
        scene = scenes.draw_scene(rng, self.concepts[first])
        mixed = rng.random() < 0.5
        rows = []
        for concept in scene:
            if concept is None:
                rows.append(len(self.tokens_VNC) - 1)
                continue
            drawing = [style for style in styles if (style, concept) in self.rows] if mixed else [first]
            rows.append(rng.choice(self.rows[rng.choice(drawing), concept]))
        return scene, rows

    def tokens(self, rows_B4: torch.Tensor) -> torch.Tensor:
        """Image tokens of pages, in the order in which the tower would give them: [B, GRID², C] float32."""
        cells = self.tokens_VNC[rows_B4].float()
        batch, channels = cells.shape[0], cells.shape[-1]
        grid = cells.reshape(batch, 2, 2, CELL_SIDE, CELL_SIDE, channels)
        tokens = grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, GRID * GRID, channels)
        return functional.dropout(tokens, FEATURE_DROPOUT) + vlm.PLACE_SCALE * PAGE_CODE


@torch.no_grad()
def tile_tokens(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: list[pg.Image.Image]
) -> torch.Tensor:
    """The tower's tokens of cells, without the code of their place, which follows when it is known: [V, N, C] bfloat16."""
    size = {"height": scenes.TILE, "width": scenes.TILE}
    parts = []
    for start in range(0, len(images), 64):
        pixels = processor.image_processor(images=images[start : start + 64], size=size, return_tensors="pt")
        told = model.model.vision_tower(pixels["pixel_values"]).last_hidden_state
        parts.append((told - vlm.PLACE_SCALE * CELL_CODE).bfloat16())
    return torch.cat(parts)


def dialogue(scene: scenes.Scene, kinds: scenes.Kinds, rng: random.Random) -> list[tuple[str, str]]:
    """Question and answer pairs about one page: questions of each form, sometimes a caption, in any order.

    Yes and no are balanced within each *form*: were they so within the type only, "is there a bird?" would mostly have "no" and
    "is there a bird in the top left?" mostly "yes" as their answer, and the form alone would tell it.
    """
    turns = []
    if rng.random() < CAPTION_SHARE:
        what = rng.choice(sorted(scenes.CAPTIONS))
        turns.append((scenes.CAPTIONS[what], scenes.describe(scene, kinds, what)))
    for form, count in ASKED.items():
        asked = [asked for asked in scenes.questions(scene, kinds, form.removesuffix(" cell")) if asked.form == form]
        answers = sorted({question.answer for question in asked})
        if not asked or (form == "yes/no cell" and len(answers) == 1):  # a page of one class has only "yes"
            continue
        for _ in range(count):
            answer = rng.choice(answers)
            question = rng.choice([question for question in asked if question.answer == answer])
            wordings = [*scenes.WORDINGS["standard"][form], *scenes.WORDINGS["varied"][form]]
            turns.append((scenes.word(question, rng.choice(wordings)), question.answer))
    rng.shuffle(turns)
    return turns


@dataclass(frozen=True)
class Packed:
    """Several turns about one image in one row; a turn sees the image and itself alone, as if it were the only one.

    (If it saw the others, it could read its answer off a caption before it, and need not look.)
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    turns: list[int]  # 0: what all share


def encode(processor: LlavaProcessor, turns: list[tuple[str, str]]) -> Packed:
    """A dialogue's tokens; the labels of everything but answers and their ends are ``IGNORED``."""
    tokenizer = processor.tokenizer

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    shared = [tokenizer.bos_token_id, *ids_of(f"USER: {vlm.IMAGE * vlm.IMAGE_TOKENS}")]
    packed = Packed(list(shared), [IGNORED] * len(shared), list(range(len(shared))), [0] * len(shared))
    for number, (question, answer) in enumerate(turns, start=1):
        asked, told = ids_of(f"{question} ASSISTANT:"), ids_of(answer + vlm.EOS)
        packed.ids.extend(asked + told)
        packed.labels.extend([IGNORED] * len(asked) + told)
        packed.positions.extend(range(len(shared), len(shared) + len(asked) + len(told)))
        packed.turns.extend([number] * (len(asked) + len(told)))
    return packed


def teach_words(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, features: TileFeatures, log: IO[str]
) -> None:
    """Train projector and embeddings so that a tile's projected tokens read as words, through the language model's last
    norm and head: those of its name, its class and its cell. What the language model then learns is to answer from words.
    """
    rng = random.Random(SEED)
    kinds = pg.make_split().label
    size = len(vlm.vocabulary())

    def shares(*texts: str) -> torch.Tensor:
        share = torch.zeros(size)
        for text in texts:
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            share[ids] += 1 / len(texts) / len(ids)
        return share

    names = {concept: shares(scenes.words(concept), scenes.NOUNS[kinds[concept]]) for _, concept in features.rows}
    tiles_of = [(row, names[concept]) for (_, concept), rows in features.rows.items() for row in rows]
    tiles_of += [(len(features.tokens_VNC) - 1, shares("nothing"))] * (len(tiles_of) // 20)
    cells = torch.stack([shares(cell) for cell in scenes.CELLS])
    of_cell = torch.arange(GRID * GRID).reshape(2, CELL_SIDE, 2, CELL_SIDE).permute(0, 2, 1, 3).reshape(4, -1)
    places = vlm.PLACE_SCALE * PAGE_CODE[of_cell]
    read = model.model.language_model.norm
    trained = [*model.model.multi_modal_projector.parameters(), *model.lm_head.parameters(), *read.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    for step in range(WORD_STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate(step, WORD_STEPS, WARMUP_STEPS)
        chosen = rng.choices(tiles_of, k=WORD_TILES)
        cell = torch.tensor([rng.randrange(4) for _ in chosen])
        told = (1 - CELL_SHARE) * torch.stack([share for _, share in chosen]) + CELL_SHARE * cells[cell]
        seen = features.tokens_VNC[[row for row, _ in chosen]].float()
        seen = functional.dropout(seen, FEATURE_DROPOUT) + places[cell]
        logits = model.lm_head(read(model.model.multi_modal_projector(seen).mean(dim=1)))
        loss = functional.cross_entropy(logits, told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(json.dumps({"phase": "words", "step": step + 1, "loss": round(loss.item(), 4)}), file=log, flush=True)


def batches(features: TileFeatures, processor: LlavaProcessor, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """``steps`` batches: those of ``padded``, and ``image_tokens`` [B, GRID², C]."""
    kinds = pg.make_split().label
    for step in range(steps):
        rng = random.Random(f"{SEED}/{step}")
        pages = [features.page(rng) for _ in range(BATCH_PAGES)]
        encoded = [encode(processor, dialogue(scene, kinds, rng)) for scene, _ in pages]
        image_tokens = features.tokens(torch.tensor([tile_rows for _, tile_rows in pages]))
        yield {**padded(processor, encoded), "image_tokens": image_tokens}


def padded(processor: LlavaProcessor, rows: list[Packed]) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right: ``input_ids``, ``labels``, ``position_ids`` [B, T], and ``attention_mask``
    [B, 1, T, T], True where a token sees another."""
    longest = max(len(row.ids) for row in rows)

    def filled(name: str, fill: int) -> torch.Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

    turns = filled("turns", -1)
    before = torch.ones(longest, longest, dtype=torch.bool).tril()
    seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    return {
        "input_ids": filled("ids", processor.tokenizer.pad_token_id),
        "labels": filled("labels", IGNORED),
        "position_ids": filled("positions", 0),
        "attention_mask": (before & seen)[:, None],
    }


def loss_of(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the supervised tokens, with the image's tokens in place of the tower's."""
    embedded = model.get_input_embeddings()(batch["input_ids"])
    seen = model.model.multi_modal_projector(batch["image_tokens"])
    holes = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    embedded = embedded.masked_scatter(holes, seen)
    told = {name: batch[name] for name in ("attention_mask", "position_ids")}
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False, **told).last_hidden_state
    following = batch["labels"][:, 1:]
    supervised = following != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[:, :-1][supervised]), following[supervised])


def rate(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine to 0: the share of the peak's learning rate at ``step``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def align(foundation: Path, packages: Path, out: Path, steps: int) -> None:
    """Run the phase and write model, processor and log into ``out``, the model every ``SAVE_STEPS`` steps."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model, processor = vlm.make_model(foundation, SEED).eval(), vlm.make_processor()
    tower, projection = model.model.vision_tower, vlm.read_foundation(foundation).visual_projection
    with open(out / "align.jsonl", "w", encoding="utf-8") as log:
        teach_styles(tower, projection, packages, rate, log, SEED)
        tower.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        features = TileFeatures(model, processor, packages)
        teach_words(model, processor, features, log)
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        for step, batch in enumerate(batches(features, processor, steps)):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate(step, steps, WARMUP_STEPS)
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            if step % LOG_STEPS == LOG_STEPS - 1 or step == 0:
                line: dict[str, Any] = {
                    "phase": "dialogues",
                    "step": step + 1,
                    "loss": round(loss.item(), 4),
                    "grad_norm": round(norm.item(), 3),
                    "seconds": round(time.monotonic() - started, 1),
                }
                print(json.dumps(line), file=log, flush=True)
            if step + 1 == steps or step % SAVE_STEPS == SAVE_STEPS - 1:
                model.save_pretrained(out)
                processor.save_pretrained(out)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundation", type=Path, required=True, help="the CLIP-style foundation model's folder")
    parser.add_argument("--packages", type=Path, required=True, help="where the pictogram packages are kept")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of dialogues (default: %(default)s)")
    options = parser.parse_args(arguments)
    align(options.foundation, options.packages, options.out, options.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
