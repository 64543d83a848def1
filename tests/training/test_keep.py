"""Between two steps of a job of many ranks: how often they agree whether to stop. The ranks are imagined."""

from __future__ import annotations

from typing import Any

import pytest

from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.config.schema import CheckpointConfig
from digrap_scale.errors import Preempted
from digrap_scale.training import keep
from digrap_scale.training.faults import Nobody, StopRequest


class Imagined(Ranks):
    """As many ranks as one likes; the others wish what ``others`` says."""

    agreed: list[int]
    others: int

    def any_of(self, flags: int) -> int:
        self.agreed.append(flags)
        return flags | self.others

    def together(self, action: Any) -> list[Any]:
        return [action()]


class Quiet:
    """Stands in for saver, state and loader."""

    failed, bad_samples = False, 0

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save(self, contents: int, wait: bool) -> None:
        self.saved.append(contents)

    def contents(self, step: int, data: Any) -> int:
        return step

    def state_dict(self, bad_samples: int) -> dict[str, Any]:
        return {}


class Clock:
    """A step takes ``step_s``."""

    now, step_s = 0.0, 0.1

    def monotonic(self) -> float:
        return self.now


def run(
    monkeypatch: pytest.MonkeyPatch, size: int, step_s: float, steps: int, others: int = 0, every: int | None = None
) -> tuple[list[int], Quiet, StopRequest, keep.Keeper, Clock]:
    clock = Clock()
    monkeypatch.setattr(keep, "time", clock)
    ranks, quiet, stop = Imagined(0, size), Quiet(), StopRequest()
    object.__setattr__(ranks, "agreed", [])
    object.__setattr__(ranks, "others", others)
    settings = CheckpointConfig(every_steps=every)
    keeper = keep.Keeper(quiet, quiet, settings, stop, ranks, steps, quiet, Nobody())  # type: ignore[arg-type]
    at = []
    for step in range(1, steps + 1):
        clock.now += step_s
        before = len(ranks.agreed)
        keeper.after_step(step)
        if len(ranks.agreed) > before:
            at.append(step)
    return at, quiet, stop, keeper, clock


def test_few_ranks_agree_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, 8, 0.01, 20)[0] == list(range(1, 21))


def test_many_agree_about_once_a_second_and_in_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s a step: every 8th; 2 s: every one; 1 ms: every 32nd."""
    assert run(monkeypatch, 200, 0.1, 20)[0] == [1, 9, 17, 20]
    assert run(monkeypatch, 200, 2.0, 5)[0] == [1, 2, 3, 4, 5]
    assert run(monkeypatch, 200, 0.001, 70)[0] == [1, 33, 65, 70]


def test_the_most_careful_rank_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank wishes every 2nd."""
    assert run(monkeypatch, 200, 0.1, 7, others=1 << (2 + 1))[0] == [1, 3, 5, 7]


def test_checkpoints_are_saved_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quiet, *_ = run(monkeypatch, 200, 0.001, 30, every=10)
    assert quiet.saved == [10, 20, 30]


def test_a_wish_to_stop_is_kept_until_the_next_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quiet, stop, keeper, clock = run(monkeypatch, 200, 0.1, 3)
    keeper._total_steps = 100
    stop.wanted = True
    for step in range(4, 11):
        clock.now += 0.1
        keeper.after_step(step)
    assert quiet.saved == []
    with pytest.raises(Preempted, match="saved step 11"):
        keeper.after_step(11)
    assert quiet.saved == [11]
