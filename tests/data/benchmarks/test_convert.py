"""Each converter on small files in its benchmark's official format: samples, bytes, and what it says of bad input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from digrap_scale.data import make
from digrap_scale.data.benchmarks import base
from digrap_scale.data.benchmarks.build import BENCHMARKS
from digrap_scale.data.classes import load_classes
from digrap_scale.data.reading import samples_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.data.splitting import Span

from .files import IMAGE, WRITERS, Files, picture

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from convert_vqa import main  # noqa: E402

TEN = ["dog"] * 10
EXPECTED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vqav2": [
        ("262284000", {"question": "What is it?", "question_id": 262284000, "answers": TEN, "question_type": "what",
                       "answer_type": "other"}),
        ("262284001", {"question": "Is it red?", "question_id": 262284001, "answers": ["yes"] * 9 + [""],
                       "question_type": "is it", "answer_type": "yes/no"}),
        ("9000", {"question": "How many?", "question_id": 9000, "answers": ["2"] * 9 + ["two"],
                  "question_type": "how many", "answer_type": "number"}),
    ],
    "iv-vqa": [
        (f"262284004-{image}", {"question": "How many zebras are there?", "question_id": 262284004,
                                "answers": [count] * 10, "question_type": "what", "answer_type": "other",
                                "image_id": image})
        for image, count in (("000000262284_000000000018", "1"), ("000000262284_000000000044", "1"), (IMAGE, "2"))
    ],
    "vqa-cp-v2": [
        (str(i), {"question": "What?", "question_id": i, "answers": TEN, "question_type": "what",
                  "answer_type": "other"})
        for i in (1, 2)
    ],
    "advqa": [
        (str(i), {"question": text, "question_id": i, "answers": ["stop"] * 10, "answer_type": "other"})
        for i, text in ((5, "What is on the sign?"), (6, "Where is it?"))
    ],
    "textvqa": [
        ("34602", {"question": "what brand is this?", "question_id": 34602,
                   "answers": ["nokia"] * 9 + ["answering does not require reading text in the image"]}),
    ],
    "vizwiz": [
        ("VizWiz_val_00000000", {"question": "Ok. There is another picture I hope it is a better one.",
                                 "question_id": "VizWiz_val_00000000", "answers": ["unanswerable"] * 10,
                                 "answer_type": "unanswerable", "answerable": 0}),
    ],
    "ok-vqa": [
        ("2622840", {"question": "What sport is it used for?", "question_id": 2622840, "answers": ["race"] * 10,
                     "question_type": "Vehicles and Transportation", "answer_type": "other"}),
    ],
    "domainnet": [
        ("real_001_000001", {"label": "aircraft carrier", "domain": "real", "class_index": 0}),
        ("real_002_000024", {"label": "airplane", "domain": "real", "class_index": 1}),
    ],
    "coco-captions": [
        ("262284", {"caption": "A red wall.", "captions": ["A red wall."], "image_id": IMAGE}),
        ("9", {"caption": "A zebra.", "captions": ["A zebra.", "A zebra on grass."], "image_id": 9}),
    ],
}  # fmt: skip
EXPECTED["cv-vqa"] = EXPECTED["iv-vqa"]
EXPECTED["vqa-rephrasings-og"] = [
    (f"{identity}-{image}", {"question": text, "question_id": identity, "answers": [f"dog {image}"] * 10,
                             "question_type": "what", "answer_type": "other", "image_id": image, **more})
    for image, first, again in ((73, 73000, 730000), (730, 730000, 7300000))
    for identity, text, more in (
        (first, f"What is {image}?", {}),
        *((again + i, f"Say what {image} is ({i})", {"rephrasing_of": first}) for i in range(3)),
    )
]  # fmt: skip
EXPECTED["vqa-rephrasings"] = [one for one in EXPECTED["vqa-rephrasings-og"] if "rephrasing_of" in one[1]]
EXPECTED["vqa-ce"] = [EXPECTED["vqav2"][0], EXPECTED["vqav2"][2]]


def run(name: str, files: Files, *options: str) -> tuple[int, Path]:
    out = files.folder / "out"
    return main([name, *files.arguments, "--out", str(out), *options]), out


def read(out: Path, pattern: str = "*.tar") -> list[tuple[str, dict[str, Any], Image.Image]]:
    shards = ShardSet.open([str(out / pattern)])
    spans = [Span(i, 0, count) for i, count in enumerate(shards.counts)]
    return [(one["key"], one["meta"], one["image"]) for one in samples_of(spans, shards.paths)]


def test_every_benchmark_is_tested() -> None:
    assert set(BENCHMARKS) == set(EXPECTED) == set(WRITERS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_samples(name: str, tmp_path: Path) -> None:
    code, out = run(name, WRITERS[name](tmp_path / "a"), "--samples-per-shard", "2")
    assert code == 0
    expected = [(key, {**meta, "image_count": 1}) for key, meta in EXPECTED[name]]
    assert [(key, meta) for key, meta, _ in read(out)] == expected
    _, again = run(name, WRITERS[name](tmp_path / "b"), "--samples-per-shard", "2")
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((out / file).read_bytes() == (again / file).read_bytes() for file in files), "not deterministic"


def test_images_belong_to_their_questions(tmp_path: Path) -> None:
    _, out = run("vqav2", WRITERS["vqav2"](tmp_path), "--prefix", "val")
    assert [path.name for path in sorted(out.iterdir())] == ["val-000000.tar", "val.manifest.json", "val.offsets.npy"]
    colours = [image.getpixel((5, 5)) for _, _, image in read(out)]
    assert [max(range(3), key=lambda i: colour[i]) for colour in colours] == [0, 0, 2]  # type: ignore[index]


@pytest.mark.parametrize("name", ["vqa-rephrasings", "vqa-rephrasings-og"])
def test_a_rephrasing_keeps_its_image_where_its_id_is_anothers(name: str, tmp_path: Path) -> None:
    _, out = run(name, WRITERS[name](tmp_path))
    found = read(out)
    assert len({key for key, _, _ in found}) == len(found)
    for _, meta, image in found:
        red, _, blue = image.getpixel((5, 5))  # type: ignore[misc]
        assert (red > blue) == (meta["image_id"] == 73)


def test_large_images_are_shrunk(tmp_path: Path) -> None:
    files = WRITERS["vizwiz"](tmp_path)
    _, out = run("vizwiz", files, "--longest-side", "20")
    assert read(out)[0][2].size == (20, 15)
    before = (out / "vizwiz-000000.tar").read_bytes()
    run("vizwiz", files, "--longest-side", "20")
    assert (out / "vizwiz-000000.tar").read_bytes() == before


def test_processes_and_a_limit_in_bytes_change_nothing_else(tmp_path: Path) -> None:
    files = WRITERS["vqav2"](tmp_path)
    _, out = run("vqav2", files, "--samples-per-shard", "1")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("vqav2", files, "--samples-per-shard", "1", "--processes", "2", "--shard-mb", "1")[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and len(before) == 5
    for image in (files.folder / "images").rglob("*.jpg"):
        image.write_bytes(image.read_bytes() + bytes(400_000))
    assert run("vqav2", files, "--shard-mb", "1")[0] == 0
    assert [path.stat().st_size < 10**6 for path in sorted(out.glob("*.tar"))] == [True, True]


def test_an_image_of_several_questions_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = base.decode_image
    monkeypatch.setattr(base, "decode_image", lambda data, where: (decoded.append(where), decode(data, where))[1])
    assert run("vqav2", WRITERS["vqav2"](tmp_path))[0] == 0
    assert [Path(name).name[-8:] for name in decoded] == ["2284.jpg", "0009.jpg"]


def test_what_a_killed_conversion_skipped_is_told_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its third shard, after the first image turned out broken: that is not decoded again, but still told."""
    files = WRITERS["vqav2"](tmp_path)
    files.image("val2014/COCO_val2014_000000262284.jpg", picture("red")[:-300])
    write, written = make._write_shard, []

    def dies(path: Path, items: Any, skip: bool) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, items, skip)

    monkeypatch.setattr(make, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        run("vqav2", files, "--samples-per-shard", "1", "--skip")
    monkeypatch.setattr(make, "_write_shard", lambda *given: (written.append(given[0].name), write(*given)))
    assert run("vqav2", files, "--samples-per-shard", "1")[0] == 2  # not without --skip
    assert "sample 262284000 cannot be written" in capsys.readouterr().err
    code, out = run("vqav2", files, "--samples-per-shard", "1", "--skip")
    assert code == 0 and written == [f"vqav2-00000{i}.tar" for i in range(3)]
    assert "skipped: 2 unreadable image (first: sample 262284000 cannot" in capsys.readouterr().out
    assert [path.name for path in sorted(out.iterdir())] == [  # a shard of none but broken samples is none
        "vqav2-000002.tar", "vqav2.manifest.json", "vqav2.offsets.npy",
    ]  # fmt: skip
    assert [key for key, _, _ in read(out)] == ["9000"]
    files.image("val2014/COCO_val2014_000000000009.jpg", picture("red")[:-300])
    assert run("vqav2", files, "--skip")[0] == 2
    assert "no samples for shards vqav2-*.tar: all were left out (first: sample 262" in capsys.readouterr().err


def change(files: Files, file: str, edit: Any) -> None:
    path = files.folder / file
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


CAPTIONS = "captions_val2017.json"
Q, A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
# benchmark, what is done to its files, what the one line says, samples that are left with --skip (None: no file at all)
BAD: list[tuple[str, Any, str, int | None]] = [
    ("vqav2", lambda f: (f.folder / "images/val2014/COCO_val2014_000000000009.jpg").unlink(),
     f"{Q}: question_id 9000: no image val2014/COCO_val2014_000000000009.jpg or COCO_val2014_000000000009.jpg in", 2),
    ("vqav2", lambda f: f.image("val2014/COCO_val2014_000000000009.jpg", picture("red")[:-300]),
     "COCO_val2014_000000000009.jpg: the image cannot be decoded", 2),
    ("vqav2", lambda f: change(f, A, lambda d: d["annotations"].pop()),
     f"{Q}: question_id 262284001: has no annotation in", 2),
    ("vqav2", lambda f: change(f, Q, lambda d: d["questions"].pop(0)),
     f"{A}: question_id 262284000 is not in", 2),
    ("vqav2", lambda f: change(f, A, lambda d: d["annotations"][0].update(image_id=1)),
     f"{Q}: question_id 9000: image_id is 9, but 1 in", 2),
    ("vqav2", lambda f: change(f, A, lambda d: d["annotations"][0].update(answers=[])),
     f"{Q}: question_id 9000: answers: expected a list that is not empty, found []", 2),
    ("vqav2", lambda f: change(f, Q, lambda d: d["questions"][2].update(question=3)),
     f"{Q}: question_id 9000: question: expected str, found 3", 2),
    ("vqav2", lambda f: change(f, Q, lambda d: d["questions"].append(d["questions"][0])),
     f"{Q}: question_id 262284000 comes twice", None),
    ("vqav2", lambda f: change(f, Q, lambda d: d["questions"][0].pop("question_id")),
     f"{Q}: record 0: question_id: expected int or str, found None", None),
    ("vqav2", lambda f: change(f, Q, lambda d: d.pop("data_subtype")),
     f"{Q}: data_subtype: expected one of train2014, val2014, found None", None),
    ("vqav2", lambda f: change(f, A, lambda d: d.pop("annotations")),
     f"{A}: expected an object with the key 'annotations', found keys info, license", None),
    ("vqav2", lambda f: (f.folder / A).write_text("[]"),
     f"{A}: expected an object with the key 'annotations', found a list", None),
    ("vqav2", lambda f: (f.folder / A).write_text("{"), f"{A}: not JSON", None),
    ("vqav2", lambda f: (f.folder / A).unlink(), f"{A}: cannot be read: No such file", None),
    ("vqa-cp-v2", lambda f: change(f, "vqacp_v2_test_questions.json", lambda d: d[1].update(coco_split="test2015")),
     "vqacp_v2_test_questions.json: question_id 2: coco_split: expected one of train2014, val2014, found 'test2015'", 1),
    ("iv-vqa", lambda f: change(f, Q, lambda d: d["questions"][0].update(image_id="../../secret")),
     "has no annotation in", 2),
    ("vqa-ce", lambda f: change(f, "counterexamples.json", lambda d: d.append(77)),
     "counterexamples.json: question id 77 is not in", 2),
    ("vqa-ce", lambda f: (f.folder / "counterexamples.json").write_text('{"a": 1}'),
     "counterexamples.json: expected a list of question ids", None),
    ("textvqa", lambda f: change(f, "TextVQA_0.5.1_val.json", lambda d: d["data"][0].pop("answers")),
     "TextVQA_0.5.1_val.json: question_id 34602: answers: expected a list that is not empty, found None", None),
    ("vizwiz", lambda f: change(f, "val.json", lambda d: d[0].update(image="../../secret.jpg")),
     "val.json: image '../../secret.jpg': image 'val/../../secret.jpg' does not stay in the folder of images", None),
    ("vizwiz", lambda f: change(f, "val.json", lambda d: d.append(3)),
     "val.json: the file: expected a list of objects", None),
    ("domainnet", lambda f: (f.folder / "real_test.txt").write_text("real/airplane/real_002_000024.jpg 1\nx y\n"),
     "real_test.txt:2: expected `domain/class/image number`, found 'x y'", 1),
    ("coco-captions", lambda f: change(f, CAPTIONS, lambda d: d["annotations"].pop(1)),
     f"{CAPTIONS}: image 262284: expected captions, found []", 1),
    ("coco-captions", lambda f: change(f, CAPTIONS, lambda d: d["annotations"][0].update(caption=None)),
     f"{CAPTIONS}: annotation 40: caption: expected str, found None", 1),
    ("coco-captions", lambda f: change(f, CAPTIONS, lambda d: d["annotations"][0].update(image_id=7)),
     f"{CAPTIONS}: annotation 40: image_id 7 is not among the images", 2),
    ("coco-captions", lambda f: change(f, CAPTIONS, lambda d: d["images"].append(d["images"][0])),
     f"{CAPTIONS}: images: id 262284 comes twice", None),
    ("coco-captions", lambda f: change(f, CAPTIONS, lambda d: d.pop("images")),
     f"{CAPTIONS}: expected an object with the key 'images'", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message", "left"), BAD)
def test_bad_input(
    name: str, spoil: Any, message: str, left: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = WRITERS[name](tmp_path)
    spoil(files)
    code, out = run(name, files)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not list(out.glob("[!.]*")), "half a set was left"
    code, out = run(name, files, "--skip")
    printed = capsys.readouterr()
    if left is None:
        assert code == 2 and len(printed.err.strip().splitlines()) == 1
        return
    assert code == 0 and f"{left} samples" in printed.out and "skipped: " in printed.out and message in printed.out
    assert len(read(out)) == left


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vqa-ce", [], "subset: this benchmark needs a file for it; give --subset FILE"),
        ("vqav2", ["--images", "/nowhere"], "images: /nowhere is not a folder"),
        ("vqav2", ["--classes-out", "c.json"], "--classes-out: only domainnet has classes"),
        ("vqav2", ["--longest-side", "0"], "--longest-side: expected 1 or more, found 0"),
        ("vqav2", ["--longest-side", "9", "--shard-mb", "1"], "--shard-mb: with --longest-side images have no size"),
        ("vqav2", ["--shard-mb", "0"], "--shard-mb: expected 1 or more, found 0"),
        ("vqav2", ["--processes", "0"], "--processes: expected 1 or more, found 0"),
        ("vqav2", ["--prefix", "a/b"], "shard prefix 'a/b'"),
        ("vqav2", ["--samples-per-shard", "0"], "samples_per_shard 0"),
    ],
)
def test_bad_options(
    name: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(name, WRITERS["vqav2"](tmp_path), *options)
    assert code == 2 and message in capsys.readouterr().err


def test_classes_of_domainnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = WRITERS["domainnet"](tmp_path)
    file = tmp_path / "classes.json"
    assert run("domainnet", files, "--classes-out", str(file))[0] == 0
    classes = load_classes(file)
    assert classes.names == ("aircraft carrier", "airplane")
    assert classes.prompts == ("a photo of a aircraft carrier.", "a photo of a airplane.")
    (tmp_path / "real_test.txt").write_text("real/airplane/real_002_000024.jpg 1\n")
    capsys.readouterr()
    assert run("domainnet", files, "--classes-out", str(file))[0] == 2
    assert "class 0 has no image" in capsys.readouterr().err


def test_a_png_under_a_jpg_name_is_stored_as_png(tmp_path: Path) -> None:
    import tarfile

    _, out = run("textvqa", WRITERS["textvqa"](tmp_path))
    with tarfile.open(out / "textvqa-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["34602.json", "34602.png"]
        stored = tar.extractfile("34602.png")
        assert stored is not None and Image.open(io.BytesIO(stored.read())).format == "PNG"
