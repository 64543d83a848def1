"""The registry: a benchmark's name on the command line → its format."""

from __future__ import annotations

from digrap_scale.data.benchmarks import (
    advqa,
    causal,
    coco_captions,
    domainnet,
    rephrasings,
    textvqa,
    vizwiz,
    vqace,
    vqacp,
    vqav2,
)
from digrap_scale.data.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": vqav2.BENCHMARK,
    "iv-vqa": causal.BENCHMARK,
    "cv-vqa": causal.BENCHMARK,
    "vqa-rephrasings": rephrasings.BENCHMARK,
    "vqa-rephrasings-og": rephrasings.WITH_ORIGINALS,
    "vqa-cp-v2": vqacp.BENCHMARK,
    "vqa-ce": vqace.BENCHMARK,
    "advqa": advqa.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "vizwiz": vizwiz.BENCHMARK,
    "ok-vqa": vqav2.BENCHMARK,
    "domainnet": domainnet.BENCHMARK,
    "coco-captions": coco_captions.BENCHMARK,
}
