"""Small question-answering samples: one image, several, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.samples import encoded, raw_tar

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTIONS = ["what colour is this ?", "what colour is the picture in this picture ?", "colour ?"]


def vqa_members(index: int, images: int = 1) -> list[tuple[str, bytes]]:
    """Question ``index`` about ``images`` squares of one colour, ten annotators."""
    name = list(COLOURS)[index % len(COLOURS)]
    meta: dict[str, Any] = {
        "question": QUESTIONS[index // 2 % len(QUESTIONS)],
        "answers": [name] * 8 + ["cat", "fire engine"],
        "question_type": "what colour" if index % 2 else "colour",
    }
    picture = encoded(tuple(value // (1 + index % 4) for value in COLOURS[name]), size=12 + index)
    names = ["png"] if images == 1 else [f"{number}.png" for number in range(images)]
    key = f"q{index:04d}"
    return [(f"{key}.json", json.dumps(meta).encode()), *((f"{key}.{name}", picture) for name in names)]


def vqa_shard(path: Path, images: list[int]) -> Path:
    """A shard in which sample i has ``images[i]`` images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return raw_tar(path, [member for i, count in enumerate(images) for member in vqa_members(i, count)])
