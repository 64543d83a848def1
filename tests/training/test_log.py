from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tracemalloc

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digrap_scale.errors import CheckpointError, ConfigError, Preempted, SaveError
from digrap_scale.training.log import METRICS, RunLog, read_metrics, read_status, read_strength, trim

KEYS = [*METRICS, "skipped"]


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def run_log(folder, *, rank=0, total=20, board=False, every=5, strength_every=10, start=0, screen=None):
    return RunLog(
        folder,
        rank=rank,
        total_steps=total,
        tensorboard=board,
        every_steps=every,
        strength_every_steps=strength_every,
        start_step=start,
        console=screen or console(),
    )


def take(log, steps, *, skipped=(), loss=1.5, strength=0.25):
    for step in steps:
        log.advance(step, samples=8, skipped=step in skipped)
        if log.due(step):
            log.metrics(step, loss=loss, learning_rate=1e-3, grad_norm=2.0, strength_mean=strength, conflict_rate=0.5)
        if log.strength_due(step):
            log.strength(step, {"a.weight": strength, "b": torch.tensor(0.5)})


def test_a_whole_run(tmp_path):
    screen = console()
    with run_log(tmp_path, board=True, screen=screen) as log:
        assert read_status(tmp_path)["state"] == "running"
        take(log, range(1, 21), skipped={7, 8})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    assert all(list(row) == KEYS for row in rows)
    assert [row["skipped"] for row in rows] == [0, 0, 2, 0, 0]
    assert rows[0]["loss"] == 1.5 and rows[0]["conflict_rate"] == 0.5 and rows[0]["samples_per_second"] > 0
    history = read_strength(tmp_path)
    assert history.steps == [1, 10, 20] and history.names == ["a.weight", "b"]
    assert history.values.tolist() == [[0.25, 0.5]] * 3
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["reason"], status["step"]) == ("done", 0, "", 20)
    assert status["started"] <= status["ended"]
    shown = screen.file.getvalue().splitlines()
    assert len(shown) == 5 and shown[2].startswith("step 10/20 · loss 1.5 · ω 0.250")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 5, 10, 15, 20]
    assert len(board.Tags()["scalars"]) == len(METRICS)  # skipped instead of step


def test_other_ranks_write_and_show_nothing(tmp_path):
    screen = console()
    folder = tmp_path / "run"
    with run_log(folder, rank=1, board=True, screen=screen) as log:
        take(log, range(1, 21))
        log.message("hello")
        due = [step for step in range(1, 21) if log.due(step)]
    assert not folder.exists() and screen.file.getvalue() == ""
    assert due == [1, 5, 10, 15, 20]


def test_values_that_are_not_finite_stay_json(tmp_path):
    with run_log(tmp_path, board=True) as log:
        take(log, [1], loss=float("nan"), skipped={1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert read_metrics(tmp_path)[0]["skipped"] == 1


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (ConfigError(["first: bad", "second: bad"]), "failed", 2, "first: bad · second: bad"),
        (CheckpointError("no weights"), "failed", 3, "no weights"),
        (ValueError("broken\n  inside"), "failed", 1, "ValueError: broken · inside"),
        (KeyboardInterrupt(), "failed", 130, "interrupted from the keyboard"),
        (Preempted("preempted; saved step 3"), "preempted", 75, "preempted; saved step 3"),
        (SystemExit(0), "done", 0, ""),
        (SystemExit(4), "failed", 4, "exit code 4"),
    ],
)
def test_status_says_how_it_ended(tmp_path, error, state, code, reason):
    with pytest.raises(type(error)), run_log(tmp_path) as log:
        take(log, [1, 2, 3])
        raise error
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["reason"], status["step"]) == (state, code, reason, 3)
    assert status["ended"]


def test_resume_continues_the_files(tmp_path):
    with run_log(tmp_path) as log:
        take(log, range(1, 16))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    with (tmp_path / "strength/strength.jsonl").open("a") as file:
        file.write('{"step": 17, "values": [0.1, 0.')
    with run_log(tmp_path, start=12) as log:
        take(log, range(13, 21), strength=0.75)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 5, 10, 13, 15, 20]
    history = read_strength(tmp_path)
    assert history.steps == [1, 10, 13, 20]
    assert history.values[:, 0].tolist() == [0.25, 0.25, 0.75, 0.75]


def test_a_new_start_clears_old_lines(tmp_path):
    with run_log(tmp_path) as log:
        take(log, range(1, 21))
    with run_log(tmp_path) as log:
        take(log, [1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert read_strength(tmp_path).steps == [1]


def test_readers_leave_out_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="metrics.jsonl, line 1"):
        read_metrics(tmp_path)
    with pytest.raises(ConfigError, match="metrics.jsonl, line 1"):
        trim(tmp_path / "metrics.jsonl", 5)
    assert read_metrics(tmp_path / "nowhere") == [] and read_status(tmp_path) is None


def test_lines_are_on_disk_at_once(tmp_path):
    with run_log(tmp_path) as log:
        take(log, [1])
        assert len(read_metrics(tmp_path)) == 1 and read_strength(tmp_path).steps == [1]


def test_messages_are_shown_and_kept(tmp_path):
    screen = console()
    with run_log(tmp_path, screen=screen) as log:
        take(log, [1, 2, 3])
        log.message("step skipped: gradient of [layer.0] is not finite")
    assert "[layer.0]" in screen.file.getvalue()
    assert re.fullmatch(r"\S+ step 3: step skipped: .*\n", (tmp_path / "messages.log").read_text())


def test_progress_bar_on_a_terminal(tmp_path):
    screen = console(terminal=True)
    with run_log(tmp_path, screen=screen) as log:
        take(log, range(1, 21))
        log.message("a note")
    text = screen.file.getvalue()
    assert "20/20" in text and "ω 0.250" in text and "samples/s" in text and "ETA" in text and "a note" in text


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SaveError, match="cannot save"), run_log(tmp_path / "run"):
        pytest.fail("the run must not start")


def test_full_disk_names_the_file(tmp_path):
    # a file size limit stands in for the full disk
    script = f"""
import resource, signal
from digrap_scale.training.log import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with RunLog({str(tmp_path)!r}, rank=0, total_steps=99, tensorboard=False, every_steps=1, strength_every_steps=1) as log:
    for step in range(1, 100):
        log.advance(step, samples=8)
        log.metrics(step, loss=1, learning_rate=1e-3, grad_norm=2, strength_mean=0, conflict_rate=0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "SaveError: disk full saving" in done.stderr and "metrics.jsonl; free space" in done.stderr
    status = read_status(tmp_path)
    assert status["state"] == "failed" and status["exit_code"] == 4 and "disk full" in status["reason"]
    assert len(read_metrics(tmp_path)) == status["step"] - 1 > 2


def test_memory_stays_flat(tmp_path):
    with run_log(tmp_path, total=10_000, every=1, strength_every=1) as log:
        log._console = Console(file=io.StringIO(), quiet=True)
        take(log, range(1, 200))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        take(log, range(200, 1200))
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 50_000
