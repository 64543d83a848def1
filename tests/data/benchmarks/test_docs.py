"""docs/evaluation.md has a command for each benchmark, and its prefixes are those of the shipped suites."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from digrap_scale.data.benchmarks.build import BENCHMARKS

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = re.findall(r"^ *\$C (\S+) (.*)$", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_a_command_for_each() -> None:
    assert {name for name, _ in COMMANDS} >= set(BENCHMARKS) - {"vqa-rephrasings-og"}
    for name, options in COMMANDS:
        given = {word.removeprefix("--") for word in options.split() if word.startswith("--")}
        assert set(BENCHMARKS[name].needs) <= given | {"images"}, f"{name}: the command lacks a file"


def test_the_suites_find_the_shards() -> None:
    made = {match[1] for _, options in COMMANDS if (match := re.search(r"--prefix (\S+)", options))}
    made |= {prefix.replace("$domain", one) for prefix in made if "$domain" in prefix
             for one in ("real", "sketch", "painting", "infograph", "clipart")}  # fmt: skip
    for file in sorted((ROOT / "configs/suites").glob("*.yaml")):
        for entry in yaml.safe_load(file.read_text())["suite"]:
            for pattern in entry["shards"]:
                if file.stem in ("vqa_ood", "domainnet"):
                    assert Path(pattern).name.removesuffix("-*.tar") in made, f"{file.name}: {pattern}"
