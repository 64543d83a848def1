"""VQA-CE (Dancette et al. 2021, arXiv 2104.03149): the VQA v2 validation questions that shortcuts answer wrongly.

Files (github.com/cdancette/detect-shortcuts): ``counterexamples.json``, a list of 63,298 question ids of VQA v2's validation
set (``easy.json`` lists others); VQA v2's own questions, annotations and images.
Tested on small files written to this format, not on the benchmark's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from digrap_scale.data.benchmarks import vqav2
from digrap_scale.data.benchmarks.base import Benchmark, Item, Problem, Sources
from digrap_scale.data.benchmarks.vqa_json import read_json
from digrap_scale.errors import ConfigError


def read(sources: Sources) -> Iterator[Item | Problem]:
    """Items of VQA v2 whose question id the subset lists, in VQA v2's order."""
    assert sources.subset is not None
    ids = read_json(sources.subset)
    if not isinstance(ids, list) or not ids or any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise ConfigError(f"{sources.subset}: expected a list of question ids, found something else")
    left = set(ids)
    for item in vqav2.read(sources):
        if isinstance(item, Problem):
            yield item  # of the whole set: its files do not fit each other
        elif item.meta["question_id"] in left:
            left.discard(item.meta["question_id"])
            yield item
    for one in ids:
        if one in left:
            yield Problem("unknown id", f"{sources.subset}: question id {one} is not in {sources.questions}")


BENCHMARK = Benchmark(("questions", "annotations", "subset"), read)
