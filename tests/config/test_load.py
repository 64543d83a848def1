"""What the loader takes: files, numbers, overrides; and that what it dumps reads back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from digrap_scale.config import Config, dump_config, load_config, parse_config
from digrap_scale.errors import ConfigError

from .base import BASE, changed, problems


def test_the_base_config_is_good() -> None:
    config = parse_config(BASE)
    assert config.optimizer.learning_rate == 2e-3
    assert config.method.name == "digrap"
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.data.train == ["shards/train-{000..003}.tar"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1e4", 1e4), ("1.e-4", 1e-4), (".5", 0.5), ("+1.5e+2", 150.0), ("3", 3.0)],
)
def test_numbers_as_in_yaml_1_2(text: str, value: float) -> None:
    learning_rate = parse_config(changed("2e-3", text)).optimizer.learning_rate
    assert learning_rate == value
    assert isinstance(learning_rate, float)


@pytest.mark.parametrize("text", ["yes", "off", "1:30", "2024-01-01", "010", "0x1F", "1_000", "nan", "=", "<<", "1e"])
def test_what_yaml_1_1_would_change_stays_text(text: str) -> None:
    assert parse_config(changed("runs/first", text)).run.folder == text


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_booleans(text: str) -> None:
    assert parse_config(changed("runs/first", f"a\n  overwrite: {text}")).run.overwrite is True


def test_overrides() -> None:
    config = parse_config(
        BASE,
        "run.yaml",
        [
            "optimizer.learning_rate=1e-4",
            "optimizer.learning_rate=5e-4",
            "evaluation.suite=[{name: noto, shards: [a.tar], shift: id}, {name: photos, shards: [b.tar], shift: far}]",
            "evaluation.suite.0.name=twemoji",
            "evaluation.suite.1.shards.0=c.tar",
            "model.lora.target_modules=[query, value]",
            "reference.rename.^vision\\.(.*)=image.\\1",
            "method={name: l2sp, weight: 0.1}",
            "data.classes=",
            "data.target=caption",
            "training.max_grad_norm=1",
            "logging.tensorboard=false",
        ],
    )
    assert config.optimizer.learning_rate == 5e-4
    assert [(entry.name, entry.shards) for entry in config.evaluation.suite] == [
        ("twemoji", ["a.tar"]),
        ("photos", ["c.tar"]),
    ]
    assert config.model.lora is not None
    assert config.model.lora.target_modules == ["query", "value"]
    assert config.reference.rename == {"^vision\\.(.*)": "image.\\1"}
    assert config.method.model_dump() == {"name": "l2sp", "weight": 0.1}
    assert config.data.classes is None
    assert config.training.max_grad_norm == 1.0
    assert config.logging.tensorboard is False
    assert parse_config(BASE, "run.yaml", ["evaluation.suite=[]"]).evaluation.suite == []


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("optimizer.learing_rate=1", "unknown key `optimizer.learing_rate`; did you mean `learning_rate`?"),
        ("optimzer.learning_rate=1", "unknown section `optimzer`; did you mean `optimizer`?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected a number > 0, found text `fast`"),
        ("optimizer.learning_rate=", "optimizer.learning_rate: expected a number > 0, found nothing"),
        ("optimizer.learning_rate.x=1", "optimizer.learning_rate: expected a mapping of keys, found `2e-3`"),
        ("optimizer.groups.0.pattern=x", "optimizer.groups: expected a list of mappings, found a mapping"),
        ("data.train.1=x", "data.train: expected an index below 1, found `1`"),
        ("data.train.-1=x", "data.train: expected an index below 1, found `-1`"),
        ("data.train.0=7", "data.train.0: expected text, found `7`; put it in quotes"),
        (
            "data.train=[*.tar]",
            "found '.'; put text that begins with `*`, `&` or `!` in quotes",
        ),
        ("data.train=[", "not YAML: while parsing a flow node:"),
        (
            "training.epochs=2",
            "training.epochs: expected `steps`, `epochs` or `samples`, found steps (100) and epochs (2); keep one",
        ),
        ("method.name=spd", "method.weight: expected a number ≥ 0, found nothing"),
        ("method={name: digrap, name: spd}", "method.name: expected it once, found it twice (first on line 1)"),
        ("learning_rate=1", "unknown section `learning_rate`; did you mean `optimizer.learning_rate`?"),
        ("optimizer", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("optimizer..name=1", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("a." * 5000 + "b=1", "expected section.key=value"),
        ("run.folder=\udc80", "expected printable text, found the character 0xdc80"),
    ],
)
def test_a_bad_override_is_named(override: str, rest: str) -> None:
    found = [
        line
        for line in problems(BASE, override)
        if line.startswith("override `" + override[:60].replace("\udc80", "\\udc80"))
    ]
    if override == "method.name=spd":  # what is missing, and what is too much, stand in the file's section
        found = [line.replace("run.yaml:9", f"override `{override}`") for line in problems(BASE, override)]
    assert found, problems(BASE, override)
    assert rest in found[0]


def test_dump_reads_back_to_an_equal_config() -> None:
    config = parse_config(
        BASE,
        "run.yaml",
        [
            "run.folder='1e-4'",
            "run.seed=4294967295",
            "data.train=['yes', '0x1F', '1:30', '*.tar', '!x', 'a: b', ' a', 'null', \"x\\ny\\tz\", 'é🙂', '010']",
            "reference.rename={'^a\\.(\\d+)': '\\1', '1e3': '~', 'true': ''}",
            "optimizer.eps=1e-300",
            "optimizer.learning_rate=1e22",
            "method={name: digrap_update, strength_lr: 3}",
            "evaluation.suite=[{name: '=', shards: ['<<'], shift: near}]",
            "model.lora={target_modules: '.*q'}",
        ],
    )
    text = dump_config(config)
    assert parse_config(text) == config
    assert dump_config(parse_config(text)) == text
    assert "&" not in text


def test_constructing_a_config_checks_it_too() -> None:
    values = parse_config(BASE).model_dump()
    values["training"]["epochs"] = 3
    with pytest.raises(ValueError, match=r"training\.epochs: expected `steps`, `epochs` or `samples`, found steps"):
        Config(**values)


def test_load_reads_a_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_config(path) == parse_config(BASE)
    assert load_config(str(path), ["run.seed=3"]).run.seed == 3
    path.write_text(changed("2e-3", "x"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:13: optimizer.learning_rate: expected a number > 0, found text `x`"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "rest"),
    [
        (lambda path: None, ": expected a config file, found no such file"),
        (lambda path: path.mkdir(), ": expected a config file, found a folder"),
        (make_pipe, ": expected a config file, found a device"),
        (lambda path: path.write_bytes(b""), ":1: expected the sections run, model,"),
        (lambda path: path.write_bytes(b"a: b\nc: \xff\n"), ":2: expected UTF-8 text, found the byte 0xff"),
        (lambda path: path.write_bytes("a: b".encode("utf-16")), ":1: expected UTF-8 text, found the byte 0xff"),
        (lambda path: path.write_bytes(b"a: b\nc: \0\n"), ":2: expected printable text, found the character 0x0000"),
        (lambda path: path.write_bytes(b"\0" * 2**20), ":1: expected"),
        (lambda path: path.write_bytes(b"a" * 2**23), ": expected a config of at most"),
        (lambda path: path.symlink_to(path), ": expected a readable config file, found: Too many levels"),
    ],
)
def test_a_bad_file_ends_in_one_line(tmp_path: Path, make: Callable[[Path], object], rest: str) -> None:
    path = tmp_path / "run.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}{rest}"), line


def test_a_file_name_with_odd_characters() -> None:
    for name in ("no\nsuch", "no\0such", "no\udc80such", "n" * 5000):
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        (line,) = caught.value.problems
        assert line.isprintable()
