"""Whatever the text, the outcome is a Config that dumps and loads, or a ConfigError of short lines."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from digrap_scale.config import Config, dump_config, parse_config
from digrap_scale.errors import ConfigError

from .base import BASE

WORDS = st.sampled_from(
    "run model data method optimizer training evaluation suite name digrap steps learning_rate betas groups lora "
    "target_modules rename reference freeze true null 1e-4 .nan 0 -1 1:30 : - [ ] { } , & * ! !!str | > # ? % @ ` "
    "' \" \\ \\U00110000 \\ud800 << = ~ --- ... %YAML".split()
)
TEXT = st.lists(st.one_of(WORDS, st.sampled_from([" ", "\n", "\n  ", ": ", "\t"]), st.text(max_size=3)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(TEXT.map("".join))
def test_any_text_ends_in_a_config_or_a_config_error(text: str) -> None:
    check_outcome(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(BASE)), st.integers(0, 12), TEXT.map("".join))
def test_any_damage_ends_in_a_config_or_a_config_error(start: int, length: int, text: str) -> None:
    check_outcome(BASE[:start] + text + BASE[start + length :])


KEYS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)
PATHS = st.sampled_from(
    ["method", "method.name", "model.lora", "data.train.0", "reference.rename.a", "optimizer.betas"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.one_of(KEYS, PATHS), TEXT.map("".join)).map("=".join), max_size=3))
def test_any_override_ends_in_a_config_or_a_config_error(overrides: list[str]) -> None:
    check_outcome(BASE, *overrides)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), VALUES, max_size=12))
def test_any_values_end_in_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    check_outcome(yaml.safe_dump({**parse_config(BASE).model_dump(mode="json"), **values}))


def check_outcome(text: str, *overrides: str) -> None:
    try:
        config = parse_config(text, "run.yaml", overrides)
    except ConfigError as error:
        assert error.problems
        assert all(line.isprintable() and len(line) < 1000 for line in error.problems)
    else:
        assert parse_config(dump_config(config)) == config
