from __future__ import annotations

import math

import pytest
import torch

from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.strength import STRENGTH_FILE, encode_names, encode_row, read_strength


def write(folder, *lines):
    path = folder / STRENGTH_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def test_back_as_written(tmp_path):
    write(tmp_path, encode_names(["a.weight", "ä"]), encode_row(1, [0.0, 0.25]), encode_row(10, [0.1, 1.0]))
    history = read_strength(tmp_path)
    assert history.steps == [1, 10] and history.names == ["a.weight", "ä"]
    torch.testing.assert_close(history.values, torch.tensor([[0.0, 0.25], [0.1, 1.0]]))


@pytest.mark.parametrize("torn", ['{"step": 10, "val', '{"step": 10, "values": [0.5]}', "\x00\x00"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    write(tmp_path, encode_names(["a"]), encode_row(1, [0.5]), torn)
    assert read_strength(tmp_path).steps == [1]


def test_layers_may_change_between_runs(tmp_path):
    lines = [encode_names(["a", "b"]), encode_row(1, [0.1, 0.2]), encode_names(["b", "c"]), encode_row(2, [0.3, 0.4])]
    write(tmp_path, *lines)
    history = read_strength(tmp_path)
    assert history.names == ["a", "b", "c"]
    expected = torch.tensor([[0.1, 0.2, math.nan], [math.nan, 0.3, 0.4]])
    torch.testing.assert_close(history.values, expected, equal_nan=True)


def test_later_row_of_a_step_counts_and_nan_survives(tmp_path):
    write(tmp_path, encode_names(["a"]), encode_row(1, [0.1]), encode_row(2, [0.2]), encode_row(1, [math.nan]))
    history = read_strength(tmp_path)
    assert history.steps == [1, 2]
    assert math.isnan(history.values[0, 0]) and history.values[1, 0] == pytest.approx(0.2)


def test_a_run_without_strength(tmp_path):
    history = read_strength(tmp_path)
    assert history.steps == [] and history.names == [] and history.values.shape == (0, 0)


@pytest.mark.parametrize("line", ["{]\n", "[1]\n", '{"step": 3, "values": [1, 2]}\n', '{"step": 3}\n'])
def test_damage_inside_is_named(tmp_path, line):
    write(tmp_path, encode_names(["a"]), line, encode_row(4, [0.1]))
    with pytest.raises(ConfigError, match="strength.jsonl, line 2"):
        read_strength(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        read_strength(tmp_path / "nowhere")
