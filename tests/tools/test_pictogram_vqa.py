"""The tools of Pictogram-VQA: determinism with hashes, pre-training's samples, the small VLM's parts."""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ASSETS = TOOLS.parent / "digrap_scale" / "demo" / "assets"
sys.path.insert(0, str(TOOLS))

pytest.importorskip("resvg_py")

import align_pictogram_vlm as align  # noqa: E402
import make_pictogram_vqa as make  # noqa: E402
import pictogram_styles as styles  # noqa: E402
import pictogram_tiles as tiles  # noqa: E402
import pictogram_vlm as vlm  # noqa: E402
import pictogram_vqa_far as far  # noqa: E402
import pictograms as pg  # noqa: E402
import teach_pictogram_styles as teach  # noqa: E402
from pictogram_styles import vary  # noqa: E402

from digrap_scale.data.shards import write_shards  # noqa: E402
from digrap_scale.demo import scenes  # noqa: E402


def drawn() -> dict[str, dict[str, Image.Image]]:
    """Flat squares in two styles for every training concept."""
    split = pg.make_split()
    train = sorted(set(split.label) - split.test)
    return {
        style: {concept: Image.new("RGB", (64, 64), colour) for concept in train}
        for style, colour in (("noto", "red"), ("twemoji", "blue"))
    }


def test_pretraining_is_deterministic_and_knows_no_held_out_concept(tmp_path: Path) -> None:
    split = pg.make_split()
    squares = drawn()
    made = list(make.pretraining_samples(squares, split.label, 200))
    assert made[150] == list(make.pretraining_samples(squares, split.label, 151))[150]
    manifests = [write_shards(made, tmp_path / name, prefix="p", samples_per_shard=100) for name in ("a", "b")]
    assert manifests[0] == manifests[1] and len(manifests[0].shards) == 2
    assert not {concept for sample in made for concept in sample["meta"]["concepts"] if concept} & split.test
    kinds = {sample["meta"]["question_type"] for sample in made}
    assert kinds == {*scenes.QUESTION_TYPES, "caption"}
    reworded = {text.format(cell=".+", noun=".+", nouns=".+", a_noun=".+") for forms in [scenes.WORDINGS["reworded"]]
                for ones in forms.values() for text in ones}  # fmt: skip
    assert not any(sample["meta"]["question"] in reworded for sample in made)


def test_variations_keep_size_and_paper() -> None:
    """Every way of ``SHARES``: other colours, greys, lines, two tones; what is outside the drawing stays white."""
    tile = Image.new("RGB", (64, 64), "white")
    tile.paste((200, 30, 30), (16, 16, 48, 48))
    inside, kinds = set(), set()
    for seed in range(200):
        varied = vary(tile, random.Random(seed))
        assert varied.size == tile.size and varied.mode == "RGB" and varied.getpixel((2, 2)) == (255, 255, 255)
        assert varied == vary(tile, random.Random(seed))
        red, green, blue = varied.getpixel((32, 32))
        outlined = varied.getpixel((16, 32)) != (red, green, blue)
        inside.add((red, green, blue))
        kinds.add(("colour" if len({red, green, blue}) > 1 else "white" if red == 255 else "dark", outlined))
    assert len(inside) > 20
    assert {("colour", False), ("colour", True), ("white", True), ("dark", False)} <= kinds


def test_places_keep_the_paper_white_and_the_drawing_there() -> None:
    tile = torch.ones(1, 3, 64, 64)
    tile[:, :, 16:48, 16:48] = 0
    generator = torch.Generator().manual_seed(0)
    placed = styles.place(tile.repeat(100, 1, 1, 1), generator)
    assert float(placed.min()) >= 0 and float(placed.max()) <= 1 + 1e-6
    share = (1 - placed[:, 0]).mean(dim=(1, 2))
    assert 0.1 < float(share.min()) < float(share.max()) < 0.35  # a quarter of the tile, between 0.69 and 1.05 as wide
    assert float((1 - placed).amax(dim=(1, 2, 3)).min()) > 0.9


def test_the_phase_of_styles_is_deterministic_and_leaves_the_foundation_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = sorted(set(pg.make_split().label) - pg.make_split().test)[:2]
    squares = {name: Image.new("RGB", (64, 64), colour) for name, colour in zip(names, ("red", "blue"), strict=True)}
    monkeypatch.setattr(tiles, "render_tiles", lambda *_: squares)
    monkeypatch.setattr(teach, "STYLE_STEPS", 2)
    monkeypatch.setattr(teach, "STYLE_TILES", 8)
    projection = vlm.read_foundation(ASSETS / "foundation").visual_projection
    kept, towers = projection.weight.clone(), []
    for _ in range(2):
        towers.append(vlm.make_model(ASSETS / "foundation", 0).model.vision_tower)
        before = {name: tensor.clone() for name, tensor in towers[-1].state_dict().items()}
        with open(tmp_path / "log", "w") as log:
            teach.teach_styles(towers[-1], projection, tmp_path, align.rate, log, 0)
    assert not towers[0].training and torch.equal(projection.weight, kept)
    states = [tower.state_dict() for tower in towers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    assert {name for name in before if not torch.equal(before[name], states[0][name])} >= {"stem.conv.weight"}


def test_every_word_that_can_be_said_is_in_the_vocabulary() -> None:
    tokenizer = vlm.make_tokenizer()
    split = pg.make_split()
    texts = [scenes.words(concept) for concept in split.label]
    for forms in scenes.WORDINGS.values():
        for form, wordings in forms.items():
            for noun in (*scenes.NOUNS.values(), scenes.THINGS):
                question = scenes.Question("", form, noun, scenes.CELLS[3], "")
                texts += [scenes.word(question, wording) for wording in wordings]
    texts += [scenes.describe(("axe", None, "owl", "bus"), split.label, what) for what in scenes.CAPTIONS]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert ids[0] == tokenizer.bos_token_id
    words = "wine glass"
    assert tokenizer.decode(tokenizer(words)["input_ids"], skip_special_tokens=True) == words
    assert len(set(vlm.vocabulary())) == len(vlm.vocabulary())


def test_processor_writes_llavas_turns() -> None:
    processor = vlm.make_processor()
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the owl?"}]}
    told = {"role": "assistant", "content": [{"type": "text", "text": "top left"}]}
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    assert prompt == "USER: <image>\nwhere is the owl? ASSISTANT:"
    assert processor.apply_chat_template([asked, told]) == f"{prompt} top left</s>"
    ids = processor(images=[Image.new("RGB", (128, 128))], text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == vlm.IMAGE_TOKENS == 16
    # The first phase packs several turns; the first one is what the template gives.
    packed = align.encode(processor, [("where is the owl?", "top left"), ("is there a bird?", "yes")])
    assert packed.ids[: len(ids)] == ids
    supervised = [token for token, label in zip(packed.ids, packed.labels, strict=True) if label != align.IGNORED]
    assert processor.tokenizer.decode(supervised) == "top left </s> yes </s>"


def test_packed_turns_are_answered_as_if_alone() -> None:
    processor = vlm.make_processor()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(vlm.make_config()).eval()
    turns = [("where is the owl?", "top left"), ("is there a bird?", "yes"), ("describe the picture.", "owl, nothing")]
    image = torch.randn(1, vlm.IMAGE_TOKENS, 1280)

    def losses(turns: list[tuple[str, str]]) -> tuple[float, int]:
        packed = align.padded(processor, [align.encode(processor, turns)])
        count = int((packed["labels"] != align.IGNORED).sum())
        return align.loss_of(model, {**packed, "image_tokens": image}).item() * count, count

    together, count = losses(turns)
    alone = [losses([turn]) for turn in turns]
    assert count == sum(tokens for _, tokens in alone)
    assert together == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


def test_tiles_are_put_together_as_the_tower_reads_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "FEATURE_DROPOUT", 0.0)
    torch.manual_seed(0)
    model, processor = LlavaForConditionalGeneration(vlm.make_config()).eval(), vlm.make_processor()
    rng = random.Random(0)
    cells = [Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)) for _ in range(4)]
    page = Image.new("RGB", (128, 128))
    for number, cell in enumerate(cells):
        page.paste(cell, (number % 2 * 64, number // 2 * 64))
    features = align.TileFeatures.__new__(align.TileFeatures)
    features.tokens_VNC = align.tile_tokens(model, processor, cells)
    pixels = processor.image_processor(images=[page], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(features.tokens(torch.tensor([[0, 1, 2, 3]])), expected, rtol=0.01, atol=0.01)


def test_projected_tiles_read_as_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORD_STEPS": 80, "WORD_TILES": 24, "WARMUP_STEPS": 5}.items():
        monkeypatch.setattr(align, name, value)
    torch.manual_seed(0)
    model, processor = LlavaForConditionalGeneration(vlm.make_config()).eval(), vlm.make_processor()
    features = align.TileFeatures.__new__(align.TileFeatures)
    features.tokens_VNC = torch.randn(3, 4, 1280).bfloat16()
    features.rows = {("noto", "owl"): [0], ("noto", "banana"): [1]}
    log = io.StringIO()
    align.teach_words(model, processor, features, log)
    of_bottom_right = [10, 11, 14, 15]
    tokens = features.tokens_VNC[:2].float() + vlm.PLACE_SCALE * align.PAGE_CODE[of_bottom_right]
    with torch.no_grad():
        seen = model.model.language_model.norm(model.model.multi_modal_projector(tokens).mean(dim=1))
        read = model.lm_head(seen).topk(4).indices
    words = [set(processor.tokenizer.convert_ids_to_tokens(row)) for row in read.tolist()]
    assert words == [{"owl", "bird", "bottom", "right"}, {"banana", "fruit", "bottom", "right"}]


def test_form_of_a_question_does_not_tell_its_answer() -> None:
    split = pg.make_split()
    concepts, rng = tiles.concepts_of(split, "train"), random.Random(0)
    counts: dict[tuple[str, str], int] = {}
    for _ in range(400):
        for question, answer in align.dialogue(scenes.draw_scene(rng, concepts), split.label, rng):
            if answer in ("yes", "no") and question.startswith("is there"):
                form = "cell" if " in the " in question else "page"
                counts[form, answer] = counts.get((form, answer), 0) + 1
    for form in ("page", "cell"):
        share = counts[form, "yes"] / (counts[form, "yes"] + counts[form, "no"])
        assert 0.4 < share < 0.6, (form, share)


def test_answers_of_easy_vqa_tell_their_type() -> None:
    assert [far.easy_type(answer) for answer in ("yes", "triangle", "teal")] == ["yes/no", "shape", "color"]


def test_fetched_file_of_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thing-1.whl").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="SHA-256"):
        far.fetched(["false"], tmp_path, "thing-*.whl", "0" * 64)
    with pytest.raises(RuntimeError, match="failed"):
        far.fetched(["false"], tmp_path, "other-*.whl", "0" * 64)


def test_a_half_unpacked_package_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, version, _ = far.STAMPS
    package = tmp_path / f"{name}_{version}_all.deb"
    package.write_bytes(b"package")
    monkeypatch.setattr(far, "STAMPS", (name, version, hashlib.sha256(b"package").hexdigest()))
    stamps = far.STAMPS_FOLDER + "/animals/birds"
    tool = tmp_path / "bin" / "dpkg-deb"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "bird.png")
    unpacks = f'#!/bin/sh\nmkdir -p "$3/{stamps}" && cp {tmp_path}/bird.png "$3/{stamps}/'
    tool.write_text(f'{unpacks}first.png"\necho no space left >&2\nexit 2\n')
    tool.chmod(0o755)
    with pytest.raises(RuntimeError, match="no space left"):
        far.photographs(tmp_path)
    tool.write_text(f'{unpacks}first.png" && cp {tmp_path}/bird.png "$3/{stamps}/second.png"\n')
    tiles_of, label = far.photographs(tmp_path)
    assert label == {"animals/birds/first": "bird", "animals/birds/second": "bird"} and set(tiles_of) == set(label)
    tool.unlink()
    assert far.photographs(tmp_path)[1] == label  # unpacked once
