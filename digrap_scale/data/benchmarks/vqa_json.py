"""The JSON that VQA benchmarks share: records of questions, records of answers, joined by id.

Source: the VQA v2 format (visualqa.org, download; README of its evaluation code, GT-Vision-Lab/VQA):
questions ``{"data_subtype": "val2014", "questions": [{"image_id", "question", "question_id"}]}``; annotations
``{"annotations": [{"question_type", "multiple_choice_answer", "answers": [{"answer", "answer_confidence",
"answer_id"}], "image_id", "answer_type", "question_id"}]}``. COCO's images are ``COCO_val2014_000000000042.jpg``: the
image id with twelve digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digrap_scale.data.benchmarks.base import Item, Problem
from digrap_scale.errors import ConfigError

Record = dict[str, Any]
KINDS = ("question_type", "answer_type")


def read_json(path: Path) -> Any:
    """Raises: ConfigError where the file cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


@dataclass(frozen=True)
class Table:
    """A file's list of records.

    Attributes:
        path: the file.
        records: the list.
        top: the object that the list stands in; empty where the file is a list itself.
    """

    path: Path
    records: list[Record]
    top: Record

    @classmethod
    def read(cls, path: Path | None, key: str | None) -> Table:
        """The file's list at ``key``; None where the file is a list itself. Raises: ConfigError where it has another shape."""
        assert path is not None, "convert() sees to it"
        data = read_json(path)
        top = data if key is not None and isinstance(data, dict) else {}
        if key is not None and key not in top:
            kind = f"keys {', '.join(list(top)[:8])}" if top else f"a {type(data).__name__}"
            raise ConfigError(f"{path}: expected an object with the key {key!r}, found {kind}")
        found = data if key is None else top[key]
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ConfigError(f"{path}: {key or 'the file'}: expected a list of objects, found something else")
        return cls(path, found, top)


def field(record: Record, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """A record's value. Raises: ConfigError where it is missing or of another kind."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, kinds) or value == "":
        words = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ConfigError(f"{where}: {key}: expected {words}, found {value!r}")
    return value


def answers_of(record: Record, where: str) -> list[str]:
    """All annotators' answers, in order: of objects with ``answer`` (VQA) or plain texts (TextVQA).

    Raises:
        ConfigError: there is none, or one is not a text.
    """
    given = record.get("answers")
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: answers: expected a list that is not empty, found {given!r}")
    texts: list[str] = []
    for one in given:
        text = one.get("answer") if isinstance(one, dict) else one
        if not isinstance(text, str):  # an empty one does occur: an annotator said nothing
            raise ConfigError(f"{where}: answers: expected texts, found {text!r}")
        texts.append(text)
    return texts


def kinds_of(record: Record) -> Record:
    """``question_type`` and ``answer_type``, where they are given."""
    return {key: record[key] for key in KINDS if isinstance(record.get(key), str)}


def joined(
    questions: Table, annotations: Table, ids: Sequence[str] = ("question_id",)
) -> Iterator[tuple[Record, Record, str] | Problem]:
    """(question, its annotation, file and id for messages), in the order of the questions.

    A question without an annotation, or an annotation of another image, is a problem of that sample; so is an
    annotation whose question is nowhere.

    Args:
        ids: the fields that together name a sample.

    Raises:
        ConfigError: a record without id, an id that comes twice.
    """
    asked, answered = _by_id(questions, ids), _by_id(annotations, ids)
    for identity, question in asked.items():
        where = f"{questions.path}: {_shown(ids, identity)}"
        annotation = answered.get(identity)
        if annotation is None:
            yield Problem("no annotation", f"{where}: has no annotation in {annotations.path}")
        elif annotation.get("image_id", question.get("image_id")) != question.get("image_id"):
            there = f"{annotation['image_id']!r} in {annotations.path}"
            yield Problem("other image", f"{where}: image_id is {question.get('image_id')!r}, but {there}")
        else:
            yield question, annotation, where
    for identity in answered:
        if identity not in asked:
            yield Problem("unknown id", f"{annotations.path}: {_shown(ids, identity)} is not in {questions.path}")


def _by_id(table: Table, ids: Sequence[str]) -> dict[tuple[Any, ...], Record]:
    found: dict[tuple[Any, ...], Record] = {}
    for number, record in enumerate(table.records):
        identity = tuple(field(record, one, (int, str), f"{table.path}: record {number}") for one in ids)
        if identity in found:
            raise ConfigError(f"{table.path}: {_shown(ids, identity)} comes twice")
        found[identity] = record
    return found


def _shown(ids: Sequence[str], identity: Sequence[Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(ids, identity, strict=True))


def vqa_item(question: Record, annotation: Record, where: str, images: Sequence[str], key: str | None = None) -> Item:
    """The sample of a question and its annotation; further fields may be added to ``meta``. Raises: ConfigError."""
    identity = field(question, "question_id", (int, str), where)
    meta = {
        "question": field(question, "question", str, where),
        "question_id": identity,
        "answers": answers_of(annotation, where),
        **kinds_of(annotation),
    }
    return Item(key or str(identity), tuple(images), meta, where)


def coco_images(split: str, image_id: int) -> tuple[str, str]:
    """Where COCO's image may be: in its split's folder, or in the folder of images itself."""
    name = f"COCO_{split}_{image_id:012d}.jpg"
    return f"{split}/{name}", name
