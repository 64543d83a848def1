"""Between two steps: save when it is time, stop when one of the ranks was asked to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from digrap_scale.checkpoint.layout import Checkpoint
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.save import Saver
from digrap_scale.config import Config
from digrap_scale.config.schema import CheckpointConfig
from digrap_scale.data.loader import TrainingLoader
from digrap_scale.errors import PeerError, Preempted
from digrap_scale.projector import Projector
from digrap_scale.training.build_run import BuiltRun
from digrap_scale.training.faults import Nobody, StopRequest
from digrap_scale.training.log import RunLog
from digrap_scale.training.setup import Place, collective_timeout_s
from digrap_scale.training.state import RunState

_STOP, _FAILED = 1, 2
# Agreeing is a round trip over all hosts, some 10 ms for hundreds of ranks: they do it in every 2^k-th step, about once a second.
_FEW_RANKS = 8
_STRIDE_BIT, _LARGEST_STRIDE_LOG2 = 2, 5
_AGREE_EVERY_S = 1.0


class Keeper:
    """Keeps a run's state.

    Args:
        state: of the run.
        saver: where it goes.
        watch: is told what this rank does.
        settings: the config's ``checkpoint`` section.
        stop: whether this process was asked to stop.
        ranks: who agree, in a group of their own.
        total_steps: of the run.
        batches: the loader; how far it is goes with the state.
    """

    def __init__(
        self,
        state: RunState,
        saver: Saver,
        settings: CheckpointConfig,
        stop: StopRequest,
        ranks: Ranks,
        total_steps: int,
        batches: TrainingLoader,
        watch: Nobody,
    ) -> None:
        self._state, self._saver, self._settings, self._stop = state, saver, settings, stop
        self._ranks, self._total_steps, self._batches = ranks, total_steps, batches
        self.watch = watch
        self._next_agreement = 0
        self._last_agreement = (0, time.monotonic())

    def after_step(self, step: int) -> None:
        """To be called after every step, on every rank. Collective: ranks agree on one number, in a large job not in every step.

        Raises:
            SaveError: a checkpoint could not be written.
            Preempted: a rank was asked to stop; the state is saved.
        """
        due = self._due(step)
        if step < self._next_agreement and not due and step != self._total_steps:
            return
        self.watch.at(step, "agreeing whether to stop")
        flags = (_STOP if self._stop.wanted else 0) | (_FAILED if self._saver.failed else 0)
        wishes = self._ranks.any_of(flags | 1 << (_STRIDE_BIT + self._stride_log2(step)))
        shortest = next(log2 for log2 in range(_LARGEST_STRIDE_LOG2 + 1) if wishes >> (_STRIDE_BIT + log2) & 1)
        self._next_agreement, self._last_agreement = step + (1 << shortest), (step, time.monotonic())
        if wishes & _FAILED:
            self._saver.wait()
        stop = bool(wishes & _STOP)
        if stop or due:
            self.watch.at(step, "saving a checkpoint")
            bad_samples = sum(self._ranks.together(lambda: self._batches.bad_samples))
            data = self._batches.state_dict(bad_samples)
            self._saver.save(self._state.contents(step, data), wait=stop)
        if stop:
            raise Preempted(f"preempted; saved step {step}")

    def _stride_log2(self, step: int) -> int:
        """How many steps, as a power of two, this rank would let pass until the next agreement."""
        if self._ranks.size <= _FEW_RANKS:
            return 0
        then, at = self._last_agreement
        seconds = (time.monotonic() - at) / max(1, step - then)
        return min(_LARGEST_STRIDE_LOG2, max(0, int(math.log2(_AGREE_EVERY_S / max(seconds, 1e-6)))))

    def _due(self, step: int) -> bool:
        every = self._settings.every_steps
        if step == self._total_steps and not self._settings.final:
            return True  # nothing else would hold the weights
        return every is not None and step % every == 0

    def load(self, checkpoint: Checkpoint, message: Callable[[str], None]) -> None:
        """Go on from a checkpoint. Collective. Raises: CheckpointError."""
        self._state.load(checkpoint, self._ranks, message)
        self._ranks.together(lambda: self._batches.load_state_dict(checkpoint.state["data"]))


@contextmanager
def keeping(
    run: BuiltRun,
    projector: Projector,
    batches: TrainingLoader,
    config: Config,
    here: Place,
    log: RunLog,
    watch: Nobody,
    stop: StopRequest,
    ranks: Ranks,
    total_steps: int,
) -> Iterator[Keeper]:
    """A ``Keeper`` for the steps of the block; what is being saved comes to its end.

    ``ranks`` agree between steps; a save that goes on meanwhile has a group of its own.

    Raises:
        SaveError: the last save could not be written.
    """
    saver = Saver(Path(config.run.folder), config.checkpoint, Ranks.of_job(collective_timeout_s(config)), log.message)
    state = RunState(run, projector, config, here, total_steps)
    try:
        with stop.deferred():
            yield Keeper(state, saver, config.checkpoint, stop, ranks, total_steps, batches, watch)
            saver.wait()
    except BaseException as error:
        # A save that waits for a rank that is gone is not waited for.
        saver.close(wait=not isinstance(error, (RuntimeError, PeerError)))
        raise
    saver.close()
