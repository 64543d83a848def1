"""tools/make_shards.py: what goes in comes out, killed runs go on, bad input is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from make_shards import main  # noqa: E402

from digrap_scale.data import make  # noqa: E402
from digrap_scale.data.classes import load_classes  # noqa: E402
from digrap_scale.data.listing import list_folder  # noqa: E402
from digrap_scale.data.manifest import check_manifest  # noqa: E402
from digrap_scale.data.reading import samples_of  # noqa: E402
from digrap_scale.data.shards import ShardSet  # noqa: E402
from digrap_scale.data.splitting import Span  # noqa: E402
from tests.data.samples import encoded  # noqa: E402


def read(folder: Path, prefix: str = "p") -> list[dict[str, Any]]:
    assert check_manifest(folder / f"{prefix}.manifest.json") == []
    assert not list(folder.glob(".*"))
    shards = ShardSet.open([f"{folder}/{prefix}-*.tar"])
    spans = [Span(i, 0, count) for i, count in enumerate(shards.counts)]
    return list(samples_of(spans, shards.paths, shards.offsets))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "photos" / label / f"v1.{i}.PNG").write_bytes(encoded((i, 0, 0)))
    (tmp_path / "photos" / "cat" / "v1.0.txt").write_text("a cat\n")
    return tmp_path / "photos"


def run(kind: str, source: Path, out: Path, *more: str) -> int:
    common = ["--out", str(out), "--prefix", "p", "--samples-per-shard", "3", "--in-order"]
    return main([kind, str(source), *common, *more])


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_folder(photos: Path, tmp_path: Path, processes: str) -> None:
    assert run("folder", photos, tmp_path / "out", "--processes", processes) == 0
    samples = read(tmp_path / "out")
    assert [sample["key"] for sample in samples] == [f"{label}/v1_{i}" for label in ("cat", "dog") for i in range(5)]
    assert samples[0]["meta"] == {"label": "cat", "caption": "a cat", "image_count": 1}
    assert samples[9]["meta"] == {"label": "dog", "image_count": 1}
    assert samples[4]["image"].getpixel((0, 0)) == (4, 0, 0)
    assert ShardSet.open([f"{tmp_path}/out/p-*.tar"]).counts == (3, 3, 3, 1)


def test_samples_are_shuffled_by_default(photos: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "out"), "--prefix", "p"]
    assert main(["folder", str(photos), *options]) == 0
    labels = [sample["meta"]["label"] for sample in read(tmp_path / "out")]
    assert sorted(labels) == ["cat"] * 5 + ["dog"] * 5 != labels


def test_shards_are_limited_in_size(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.PNG"):
        path.write_bytes(encoded(size=8) + bytes(400_000))
    assert run("folder", photos, tmp_path / "out", "--shard-mb", "1") == 0
    assert ShardSet.open([f"{tmp_path}/out/p-*.tar"]).counts == (2,) * 5
    assert all(path.stat().st_size < 10**6 for path in (tmp_path / "out").glob("*.tar"))


def test_a_killed_run_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third shard: the first two are not written again, and the result is that of one go."""
    written: list[str] = []
    whole = make._write_shard

    def dies(path: Path, items: Any, skip: bool) -> None:
        if len(written) == 2:
            (path.parent / f".{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        whole(path, items, skip)

    monkeypatch.setattr(make, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        run("folder", photos, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    monkeypatch.setattr(make, "_write_shard", lambda *given: (written.append(given[0].name), whole(*given)))
    assert run("folder", photos, tmp_path / "out") == 0
    assert written == [f"p-00000{i}.tar" for i in range(4)]
    assert run("folder", photos, tmp_path / "once") == 0
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_file_that_changed_is_another_sample(photos: Path) -> None:
    before, _ = list_folder(photos)
    path = photos / "cat" / "v1.3.PNG"
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    after, _ = list_folder(photos)
    assert [old.key for old, new in zip(before, after, strict=True) if old.stamps != new.stamps] == ["cat/v1_3"]


def test_a_killed_run_of_other_samples_starts_anew(photos: Path, tmp_path: Path) -> None:
    making = tmp_path / "out" / ".p.making"
    making.mkdir(parents=True)
    (making / "plan.json").write_text("of another plan")
    (making / "p-000000.tar").write_bytes(b"old")
    assert run("folder", photos, tmp_path / "out") == 0
    assert len(read(tmp_path / "out")) == 10


@pytest.mark.parametrize("lines", [True, False])
def test_llava(tmp_path: Path, lines: bool, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(encoded(extension="jpg"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    more = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]
    records: list[dict[str, Any]] = [
        {"id": "000.1", "image": "coco/1.jpg", "conversations": [*turns, *more]},
        {"id": "two", "image": ["coco/1.jpg", "coco/1.jpg"], "conversations": turns},
        {"id": "text", "conversations": more},
    ]
    file = tmp_path / "llava.json"
    file.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    assert run("llava", file, tmp_path / "out") == 0
    samples = read(tmp_path / "out")
    assert [(s["key"], len(s["images"])) for s in samples] == [("000_1-0", 1), ("000_1-1", 1), ("two", 2), ("text", 0)]
    assert samples[0]["meta"] == {"id": "000.1", "question": "What?", "answers": ["A cat."], "image_count": 1}
    assert [s["meta"]["image_count"] for s in samples] == [1, 1, 2, 0]
    records += [
        {"id": "gone", "image": "coco/2.jpg", "conversations": turns},
        {"conversations": turns[:1]},
        {"id": "x"},
    ]
    file.write_text(json.dumps(records))
    capsys.readouterr()
    assert run("llava", file, tmp_path / "out") == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"{file}: ") for line in printed[:3]] == [
        f"record 3: image {tmp_path}/coco/2.jpg is missing, or cannot be read (No such file or directory)",
        "record 4: turn 0: expected human, then gpt (or user, then assistant), found human and no turn after it",
        "record 5: expected turns in `conversations` or `messages`, found None",
    ]
    assert run("llava", file, tmp_path / "out", "--skip-bad") == 0
    assert capsys.readouterr().err.count("left out: ") == 3 and len(read(tmp_path / "out")) == 4


def test_ids_that_repeat(tmp_path: Path) -> None:
    """LLaVA's ids are those of COCO's images, and several records ask about one image."""
    asks, told = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}
    records = [
        {"id": name, "conversations": [asks, told] * count}
        for name, count in [
            ("1", 1),
            ("1", 1),
            ("7", 2),
            ("7", 2),
            ("7", 1),
            ("1-1", 1),
            ("7-3", 2),
            ("1.1", 1),
            ("1_1", 1),
        ]
    ]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(records))
    assert run("llava", file, tmp_path / "out") == 0
    samples = read(tmp_path / "out")
    assert [sample["key"] for sample in samples] == [
        *("1", "1-1", "7-0", "7-1", "7-3-0", "7-3-1", "7-4", "1-1-5", "7-3-6-0", "7-3-6-1", "1_1", "1_1-8"),
    ]
    ids = [record["id"] for record in records for _ in range(len(record["conversations"]) // 2)]
    assert [sample["meta"]["id"] for sample in samples] == ids
    records[1]["image"] = "missing.jpg"  # what is left out changes no other key
    file.write_text(json.dumps(records))
    assert run("llava", file, tmp_path / "less", "--skip-bad") == 0
    assert [s["key"] for s in read(tmp_path / "less")] == [s["key"] for s in samples if s["key"] != "1-1"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "../../x.jpg"}, "image '../../x.jpg' does not stay in the folder of images"),
        ({"image": "/etc/x.jpg"}, "image '/etc/x.jpg' does not stay in the folder of images"),
        ({"image": "x.gif"}, "image 'x.gif' is none of webp, jpg, jpeg, png"),
        ({"image": 5}, "expected an image's path, or a list of such, found 5"),
        ({"image": "folder.jpg"}, "folder.jpg is no file"),
        ({"id": ""}, "sample key ''"),
        ({"conversations": []}, "expected turns in `conversations` or `messages`, found []"),
        ({"conversations": [{"value": "What?"}] * 2}, "a turn has no 'role'"),
        ({"conversations": [{"from": "human", "value": None}] * 2}, "TypeError"),
        ("text", "expected an object, found 'text'"),
    ],
)
def test_records_that_cannot_be_used(
    record: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(extension="jpg"))
    (tmp_path / "data" / "images" / "folder.jpg").mkdir(parents=True)
    good = {"id": "a", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]}
    file = tmp_path / "data" / "llava.json"
    file.write_text(json.dumps([good, {**good, "id": "b", **record} if isinstance(record, dict) else record]))
    images = ["--images", str(tmp_path / "data" / "images")]
    assert run("llava", file, tmp_path / "out", *images) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and printed[0].startswith(f"{file}: record 1: ") and message in printed[0], printed
    assert run("llava", file, tmp_path / "out", *images, "--skip-bad") == 0
    assert [sample["key"] for sample in read(tmp_path / "out")] == ["a"]


def test_chats_of_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-Factory's `messages` with `images`, and axolotl's contents in parts."""
    (tmp_path / "1.jpg").write_bytes(encoded(extension="jpg"))
    user, assistant = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}
    parts = [{"type": "image", "path": "1.jpg"}, {"type": "text", "text": "What?"}]
    in_parts = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    records: list[dict[str, Any]] = [{"images": ["1.jpg"], "messages": [user, assistant]}, {"messages": in_parts}]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(records))
    assert run("llava", file, tmp_path / "out") == 0
    for number, sample in enumerate(read(tmp_path / "out")):
        assert sample["meta"] == {"id": str(number), "question": "What?", "answers": ["A cat."], "image_count": 1}
        assert len(sample["images"]) == 1
    file.write_text(json.dumps([{"messages": [{"role": "system", "content": "Be brief."}, user, assistant]}]))
    assert run("llava", file, tmp_path / "no") == 2 and "turn 0: expected human, then gpt" in capsys.readouterr().err


def test_keys_that_collide_are_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "v1_0.png").write_bytes(encoded())
    assert run("folder", photos, tmp_path / "out") == 2
    assert "key 'cat/v1_0' comes 2 times" in capsys.readouterr().err
    (photos / "loose.png").write_bytes(encoded())
    assert run("folder", photos, tmp_path / "out") == 2
    assert "loose.png: lies in no folder" in capsys.readouterr().err
    assert run("folder", tmp_path / "nowhere", tmp_path / "out") == 2


def test_files_that_cannot_be_used(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "v1.1.txt").write_bytes(b"caf\xe9")
    (photos / "cat" / "broken.png").symlink_to("nowhere.png")
    (photos / "dog" / "folder.png").mkdir()
    (photos / "dog" / "v1_0.png").write_bytes(encoded())
    (photos / "owl").mkdir()
    (photos / "owl" / "v1.TIFF").write_bytes(b"II*")  # its class would vanish
    assert run("folder", photos, tmp_path / "out") == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 6 and printed[0].startswith(f"{photos}/cat/broken.png: image") and "is missing" in printed[0]
    assert "v1.1.PNG: its caption v1.1.txt cannot be read as UTF-8 text" in printed[1]
    assert "folder.png is no file" in printed[2] and "key 'dog/v1_0' comes 2 times" in printed[3]
    assert "owl/v1.TIFF: expected an image in webp, jpg, jpeg, png; convert it first" in printed[4]
    assert run("folder", photos, tmp_path / "out", "--skip-bad") == 0
    assert len(read(tmp_path / "out")) == 9
    assert run("folder", photos, tmp_path / "out", "--shard-mb", "0") == 2


@pytest.mark.slow
def test_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": encoded((i, 0, 0), extension="webp"), "path": None} for i in range(4)]
    columns = {"image": images, "label": [0, 1, 0, 1], "text": ["a", "b", "c", "d"]}
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["x", "y"]),
        "text": datasets.Value("string"),
    }
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(str(tmp_path / "hf"))
    assert run("hf", tmp_path / "hf", tmp_path / "out") == 0
    samples = read(tmp_path / "out")
    assert [sample["meta"] for sample in samples[:2]] == [
        {"label": "x", "text": "a", "image_count": 1},
        {"label": "y", "text": "b", "image_count": 1},
    ]
    assert run("hf", tmp_path / "hf", tmp_path / "out", "--image-column", "text") == 2
    assert "expected a column of images, found 'text'" in capsys.readouterr().err
    assert run("hf", tmp_path, tmp_path / "out") == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_images_of_a_hugging_face_dataset(tmp_path: Path, processes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lists of images, several columns of them, rows without one, and one of another format."""
    datasets = pytest.importorskip("datasets")
    image, gif = {"bytes": encoded(), "path": None}, {"bytes": b"GIF89a", "path": None}
    (tmp_path / "other.png").write_bytes(encoded((0, 0, 9)))
    rows = {
        "image": [image, None, gif, image, {"bytes": None, "path": str(tmp_path / "other.png")}],
        "pages": [[image, image], [image], [image], [], [image]],
        "label": [0, 1, None, -1, 1],
    }
    features = {
        "image": datasets.Image(),
        "pages": datasets.Sequence(datasets.Image()),
        "label": datasets.ClassLabel(names=["x", "y"]),
    }
    folder, out = tmp_path / "hf", tmp_path / "out"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(folder))
    more = ["--processes", processes]
    assert run("hf", folder, out) == 2
    assert "column 'pages' holds images, too: give --image-column image pages" in capsys.readouterr().err
    more += ["--image-column", "image", "pages"]
    assert run("hf", folder, out, *more) == 2
    assert "row 3: Invalid" in capsys.readouterr().err
    assert run("hf", folder, out, *more, "--skip-bad") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(told) == 3 and "row 3: " in told[0]
    assert told[1].endswith("sample 000000001 cannot be written: row 1: column 'image' has no image")
    assert told[2].endswith("sample 000000002 cannot be written: the image is neither JPEG, PNG nor WebP")
    samples = read(out)
    assert [(s["key"], s["meta"]) for s in samples] == [
        ("000000000", {"label": "x", "image_count": 3}),
        ("000000004", {"label": "y", "image_count": 2}),
    ]
    assert samples[1]["images"][0].getpixel((0, 0)) == (0, 0, 9)
    data = datasets.Dataset.from_dict({"image": [image], "image_count": [4]})
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "taken"))
    assert run("hf", tmp_path / "taken", out) == 2 and "column 'image_count'" in capsys.readouterr().err


def test_classes_are_written(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = tmp_path / "classes.json"
    assert run("folder", photos, tmp_path / "out", "--classes-out", str(classes)) == 0
    assert load_classes(classes).names == ("cat", "dog")
    for path in (photos / "cat").glob("*"):
        path.rename(photos / path.name)  # one with a caption and no label is left
    assert run("folder", photos, tmp_path / "no", "--skip-bad", "--classes-out", str(tmp_path / "no.json")) == 2
    assert "has no `label`" in capsys.readouterr().err and not (tmp_path / "no.json").exists()
