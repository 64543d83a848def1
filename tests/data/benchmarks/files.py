"""Small files in each benchmark's official format, as its converter's docstring tells it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE, OTHER = 262284, 9  # COCO image ids


def picture(colour: str, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    memory = io.BytesIO()
    Image.new("RGB", size, colour).save(memory, kind)
    return memory.getvalue()


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]


def question(identity: int, text: str, image: Any = IMAGE, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "question": text, "question_id": identity, **more}


def annotation(identity: int, texts: list[str], image: Any = IMAGE, **more: Any) -> dict[str, Any]:
    return {
        "question_type": "what",
        "multiple_choice_answer": texts[0],
        "answers": answers(*texts),
        "image_id": image,
        "answer_type": "other",
        "question_id": identity,
        **more,
    }


class Files:
    """Writes a benchmark's files below a folder; ``sources`` are the converter's arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        self.arguments = ["--images", str(folder / "images")]

    def image(self, name: str, content: bytes | None = None) -> None:
        path = self.folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if content is not None else picture("red"))

    def write(self, role: str, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        self.arguments += [f"--{role}", str(path)]
        return path


def vqav2(folder: Path) -> Files:
    files = Files(folder)
    files.write(
        "questions",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {
            "info": {"version": "2.0"},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {},
            "data_subtype": "val2014",
            "questions": [
                question(262284000, "What is it?"),
                question(262284001, "Is it red?"),
                question(9000, "How many?", OTHER),
            ],
        },
    )
    files.write(
        "annotations",
        "v2_mscoco_val2014_annotations.json",
        {
            "info": {},
            "license": {},
            "data_subtype": "val2014",
            "data_type": "mscoco",
            "annotations": [
                annotation(9000, ["2"] * 9 + ["two"], OTHER, question_type="how many", answer_type="number"),
                annotation(262284000, ["dog"] * 10),
                annotation(262284001, ["yes"] * 9 + [""], question_type="is it", answer_type="yes/no"),
            ],
        },
    )
    files.image("val2014/COCO_val2014_000000262284.jpg")
    files.image("val2014/COCO_val2014_000000000009.jpg", picture("blue"))
    return files


def okvqa(folder: Path) -> Files:
    files = Files(folder)
    files.write(
        "questions",
        "OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": [question(2622840, "What sport is it used for?")]},
    )
    typed = [{**one, "raw_answer": "racing"} for one in answers(*["race"] * 10)]
    files.write(
        "annotations",
        "mscoco_val2014_annotations.json",
        {
            "question_types": {"one": "Vehicles and Transportation", "other": "Other"},
            "annotations": [
                {
                    "image_id": IMAGE,
                    "answer_type": "other",
                    "question_type": "one",
                    "question_id": 2622840,
                    "answers": typed,
                    "confidence": 3,
                }
            ],
        },
    )
    files.image("COCO_val2014_000000262284.jpg")  # without the split's folder
    return files


def causal(folder: Path) -> Files:
    """One question about two edits of an image, and an image that was left as it is."""
    edits = ["000000262284_000000000018", "000000262284_000000000044"]
    files = Files(folder)
    asked = [question(262284004, "How many zebras are there?", image) for image in [*edits, IMAGE]]
    files.write("questions", "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    counted = [annotation(262284004, [count] * 10, image) for image, count in zip([*edits, IMAGE], "112", strict=True)]
    files.write("annotations", "v2_mscoco_val2014_annotations.json", {"annotations": counted})
    for image in edits:
        files.image(f"val2014/COCO_val2014_{image}.jpg")
    files.image("val2014/COCO_val2014_000000262284.jpg")
    return files


def rephrasings(folder: Path) -> Files:
    """The ids of image 73's rephrasings begin at 730000, which is also the id of image 730's original question."""
    files = Files(folder)
    asked: list[dict[str, Any]] = []
    for image in (73, 730):
        first = 1000 * image
        asked.append(question(first, f"What is {image}?", image))
        asked += [question(10 * first + i, f"Say what {image} is ({i})", image, rephrasing_of=first) for i in range(3)]
        files.image(f"val2014/COCO_val2014_{image:012d}.jpg", picture({73: "red", 730: "blue"}[image]))
    files.write(
        "questions",
        "v2_OpenEnded_mscoco_valrep2014_humans_og_questions.json",
        {"data_subtype": "val2014", "questions": asked},
    )
    told = [annotation(one["question_id"], [f"dog {one['image_id']}"] * 10, one["image_id"]) for one in reversed(asked)]
    files.write("annotations", "v2_mscoco_valrep2014_humans_og_annotations.json", {"annotations": told})
    return files


def vqacp(folder: Path) -> Files:
    files = Files(folder)
    splits = {IMAGE: "val2014", OTHER: "train2014"}
    asked = [question(1, "What?", IMAGE, coco_split="val2014"), question(2, "What?", OTHER, coco_split="train2014")]
    told = [annotation(i + 1, ["dog"] * 10, image, coco_split=split) for i, (image, split) in enumerate(splits.items())]
    files.write("questions", "vqacp_v2_test_questions.json", asked)
    files.write("annotations", "vqacp_v2_test_annotations.json", told)
    files.image("val2014/COCO_val2014_000000262284.jpg")
    files.image("train2014/COCO_train2014_000000000009.jpg")
    return files


def vqace(folder: Path) -> Files:
    files = vqav2(folder)
    files.write("subset", "counterexamples.json", [9000, 262284000])
    return files


def advqa(folder: Path) -> Files:
    files = Files(folder)
    asked = [question(5, "What is on the sign?"), question(6, "Where is it?", OTHER)]
    files.write("questions", "v1_OpenEnded_mscoco_val2017_advqa_questions.json", {"questions": asked})
    told = [{k: v for k, v in annotation(i, ["stop"] * 10, image).items() if k != "question_type"}
            for i, image in ((5, IMAGE), (6, OTHER))]  # fmt: skip
    files.write("annotations", "v1_mscoco_val2017_advqa_annotations.json", {"annotations": told})
    files.image("val2017/000000262284.jpg")
    files.image("val2014/COCO_val2014_000000000009.jpg")
    return files


def textvqa(folder: Path) -> Files:
    files = Files(folder)
    data = {
        "question": "what brand is this?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Camera"],
        "flickr_original_url": "unused",
        "image_width": 40,
        "image_height": 30,
        "answers": ["nokia"] * 9 + ["answering does not require reading text in the image"],
        "question_tokens": ["what", "brand", "is", "this"],
        "question_id": 34602,
        "set_name": "val",
    }
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [data]}
    files.write("annotations", "TextVQA_0.5.1_val.json", content)
    files.image("train_images/003a8ae2ef43b901.jpg", picture("green", "PNG"))  # named after another format
    return files


def vizwiz(folder: Path) -> Files:
    files = Files(folder)
    data = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
        "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10,
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    files.write("annotations", "val.json", [data])
    files.image("val/VizWiz_val_00000000.jpg")
    return files


def domainnet(folder: Path) -> Files:
    files = Files(folder)
    names = ["real/aircraft_carrier/real_001_000001.jpg", "real/airplane/real_002_000024.jpg"]
    files.write("annotations", "real_test.txt", "".join(f"{name} {i}\n" for i, name in enumerate(names)))
    for name in names:
        files.image(name)
    return files


def coco_captions(folder: Path) -> Files:
    """An image's captions stand apart, as in the official files, and one has a line end."""
    files = Files(folder)
    told = [(OTHER, "A zebra.\n"), (IMAGE, "A red wall."), (OTHER, "A zebra on grass.")]
    content = {
        "info": {"description": "COCO 2017 Dataset"},
        "licenses": [],
        "images": [
            {
                "license": 4,
                "file_name": f"{image:012d}.jpg",
                "coco_url": "unused",
                "height": 30,
                "width": 40,
                "id": image,
            }
            for image in (IMAGE, OTHER)
        ],
        "annotations": [{"image_id": image, "id": 40 + i, "caption": text} for i, (image, text) in enumerate(told)],
    }
    files.write("annotations", "captions_val2017.json", content)
    files.image(f"val2017/{IMAGE:012d}.jpg")
    files.image(f"{OTHER:012d}.jpg", picture("blue"))  # without the split's folder
    return files


WRITERS = {
    "vqav2": vqav2,
    "iv-vqa": causal,
    "cv-vqa": causal,
    "vqa-rephrasings": rephrasings,
    "vqa-rephrasings-og": rephrasings,
    "vqa-cp-v2": vqacp,
    "vqa-ce": vqace,
    "advqa": advqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "ok-vqa": okvqa,
    "domainnet": domainnet,
    "coco-captions": coco_captions,
}
