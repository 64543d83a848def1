"""Where method, backend and reference meet: inside ``optimizer.step()``, in torch's optimizer step hooks.

A step's walk, in the pre hook: views → statistics → one all-reduce → the method's per-layer update → gradients changed
in place; then the optimizer's own step; then, for methods that act on the update, the same walk once more.
A fused step takes the optimizer's place: projection and Adam in one pass over memory.
Shapes: L layers, K statistics, N local elements.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from digrap_scale.errors import CheckpointError
from digrap_scale.method import statistics as S
from digrap_scale.method.adam import adam_
from digrap_scale.method.base import Method, RowMethod
from digrap_scale.method.kernels import send
from digrap_scale.projector.early import EarlyStatistics
from digrap_scale.projector.layers import LayerCounts
from digrap_scale.projector.report import StepReport
from digrap_scale.reference.placement import Piece, ReferenceShards
from digrap_scale.sharding.adam import begin_adam_step
from digrap_scale.sharding.base import Backend, closure_first
from digrap_scale.sharding.previous import PreviousWeights
from digrap_scale.types import ShardView

# Optimizers that carry a projector, two of which would project twice, and methods, which hold one optimizer's state.
attached: weakref.WeakSet[Optimizer | Method] = weakref.WeakSet()

_ALL = slice(None)
_Portion = tuple[list[Piece], list[ShardView]]


class Projector:
    """A method, attached to an optimizer. Made by ``attach``; its state is keyed by parameter name."""

    def __init__(
        self,
        backend: Backend,
        method: Method,
        reference: ReferenceShards,
        projected_L: torch.Tensor,
        previous: PreviousWeights | None,
        *,
        max_grad_norm: float | None,
        fused: bool,
        early: bool,
    ) -> None:
        self.backend = backend
        self.method = method
        self.report = StepReport()
        self.fused = fused
        self._reference = reference
        self._projected_L = projected_L
        self._previous = previous
        self._max_grad_norm = max_grad_norm
        self._clip = 1.0
        self._idle = False
        self._stepping: list[int] = []
        self._resting: list[bool] = []
        self._unstepped = 0
        self._projected: list[bool] = projected_L.tolist()
        names = [spec.name for spec in backend.specs]
        method.prepare(projected_L, names)
        # Where ``previous`` holds no weights, the statistics hold no inner product with the displacement.
        self.layers = LayerCounts(names, projected_L & (not method.keeps_directions))
        self._early = EarlyStatistics(backend, self._measure) if early else None
        attached.update([*backend.hooked, method])
        self._handles = [optimizer.register_step_pre_hook(closure_first) for optimizer in backend.hooked]
        self._handles += [optimizer.register_step_pre_hook(self._before_step) for optimizer in backend.hooked]
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in backend.hooked]

    # The walk.

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        backend, method = self.backend, self.method
        views: dict[int, ShardView] = {}
        if backend.first_of_step():
            backend.check_optimizer()
            if method.begin_step(self.report.step + 1):
                backend.restart_optimizer_()
            resting_L = method.resting()
            self._resting = resting_L.tolist()
            backend.unscale_()
            early = [] if self._early is None else self._early.ready()
            views = self._views(range(len(backend.specs)))
            stats_LK = self._statistics(views, early)
            backend.reduce_(stats_LK, list(views))
            stats_LK = stats_LK.cpu()
            stats_LK[resting_L] = 0.0
            lr_L = torch.tensor([view.lr for view in views.values()], dtype=torch.float64)
            # torch's get_/set_optimizer_state_dict make an optimizer's state by a step with gradient and rate 0.
            self._idle = not lr_L.any() and not stats_LK[:, S.GRAD_SQ].any()
            self._unstepped = len(stats_LK)
            if not self._idle:
                self._clip = self._inspect(stats_LK)
                if not self.report.skipped:
                    self.layers.note(stats_LK)
                    method.update(_clipped(stats_LK, self._clip), lr_L)
                    self._summarize()
        handed = list(backend.stepping())
        self._unstepped -= len(handed)
        self._stepping = [layer for layer in handed if not self._resting[layer]]
        if self._idle:
            return
        if self.report.skipped:
            backend.drop_gradients()
            return
        if len(self._stepping) < len(handed):
            backend.drop_gradients([layer for layer in handed if self._resting[layer]])
        if len(views) != len(self._stepping):
            views = self._views(self._stepping)
        if self._previous is not None:
            self._previous.note_step(list(views.values()), self._stepping)
        if self.fused:
            self._step_fused(views)
        else:
            self._project(views)

    def _statistics(self, views: dict[int, ShardView], early: Sequence[int]) -> torch.Tensor:
        """This rank's statistics of all layers, [L, K] float64 on the shards' device; ``early`` were taken in backward."""
        rest = list(views) if not early else sorted(set(views) - set(early))
        if self._previous is not None:
            self._previous.fill([views[layer] for layer in rest], rest)
        stats_LK = torch.zeros(
            len(views), S.GRADIENT_STATISTICS, dtype=torch.float64, device=views[0].weight.device if views else None
        )
        for pieces, parts in self._walk(views, rest):
            rows = send(torch.tensor([piece.layer for piece in pieces]), stats_LK.device)
            stats_LK.index_add_(0, rows, self.method.statistics(parts))
        if self._early is not None:
            stats_LK[list(early)] = self._early.take(early)
        return stats_LK

    def _project(self, views: dict[int, ShardView]) -> None:
        """Change the gradients of ``views`` in place, for the optimizer to step with."""
        pulled, others = self._pulled(views)
        for pieces, parts in self._walk(views, pulled):
            self.method.apply_(parts, [piece.layer for piece in pieces], self._clip)
        if self._clip != 1.0:
            self.method.apply_([views[layer] for layer in others], others, self._clip)
        self.backend.write_back()

    def _step_fused(self, views: dict[int, ShardView]) -> None:
        """Take Adam's step on ``views`` with the projection in it; the optimizer's own then finds nothing to do."""
        states = dict(zip(views, begin_adam_step(self.backend, list(views)), strict=True))
        factors_L = self.method.factors().tolist()
        pulled, others = self._pulled(views)
        kernels = self.method.kernels
        for pieces, parts in self._walk(views, pulled):
            of_parts = [None if (state := states[p.layer]) is None else state.part(p.part) for p in pieces]
            adam_(parts, of_parts, [factors_L[piece.layer] for piece in pieces], self._clip, kernels)
        rest = [views[layer] for layer in others]
        adam_(rest, [states[layer] for layer in others], [0.0] * len(rest), self._clip, kernels)
        self.backend.drop_gradients()

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        backend, method = self.backend, self.method
        if method.acts_on_update and not self._idle and not self.report.skipped:
            views = self._views(self._stepping)
            if self._previous is not None:
                self._previous.fill(list(views.values()), self._stepping)
            if isinstance(method, RowMethod):
                self._project_rows(method, views)
            else:
                self._change_update(views)
            self._summarize()
        backend.finish_step()
        if self._previous is not None:
            self._previous.forget()
        if self._unstepped <= 0:
            self._reference.prefetch()

    def _change_update(self, views: dict[int, ShardView]) -> None:
        """Measure what the optimizer did to ``views``, and change it."""
        row = {layer: number for number, layer in enumerate(views)}
        device = next(iter(views.values())).weight.device
        stats_LK = torch.zeros(len(views), S.UPDATE_STATISTICS, dtype=torch.float64, device=device)
        for pieces, parts in self._walk(views, list(views)):
            rows = send(torch.tensor([row[piece.layer] for piece in pieces]), device)
            stats_LK.index_add_(0, rows, self.method.update_statistics(parts))
        self.backend.reduce_(stats_LK, list(views))
        stats_LK = stats_LK.cpu()
        for pieces, parts in self._walk(views, list(views)):
            of_pieces = [row[piece.layer] for piece in pieces]
            self.method.apply_update_(parts, [piece.layer for piece in pieces], stats_LK[of_pieces])

    def _project_rows(self, method: RowMethod, views: dict[int, ShardView]) -> None:
        """Project the rows of the new weights; of the rows that shards cut, ranks tell each other their shares."""
        layers = list(views)
        specs = [self.backend.specs[layer] for layer in layers]
        method.begin_rows(specs, layers, next(iter(views.values())).weight.device)
        for pieces, parts in self._walk(views, layers):
            method.measure_rows(parts, [piece.layer for piece in pieces])
        largest_L = method.join_rows(self.backend.each_rank(method.edges()).cpu())
        if (broken := ~torch.isfinite(largest_L)).any():
            raise _not_finite(specs[int(broken.nonzero()[0])].name)
        for pieces, parts in self._walk(views, layers):
            method.apply_rows_(parts, [piece.layer for piece in pieces])

    # Its parts.

    def _views(self, layers: Sequence[int]) -> dict[int, ShardView]:
        """Layer → its view, without reference and previous weights."""
        views = dict(zip(layers, self.backend.views(layers), strict=True))
        for layer, view in views.items():
            view.projected = self._projected[layer]
        return views

    def _walk(self, views: Mapping[int, ShardView], layers: Sequence[int]) -> Iterator[_Portion]:
        """``layers`` in portions, as the reference comes: its pieces, and the views cut to them."""
        if not layers:
            return
        for pieces in self._reference.pieces(layers):
            parts = []
            for piece in pieces:
                view = views[piece.layer]
                view = view if piece.part == _ALL else view.part(piece.part)
                view.reference = piece.reference
                parts.append(view)
            yield pieces, parts

    def _pulled(self, layers: Mapping[int, ShardView]) -> tuple[list[int], list[int]]:
        """The layers whose gradient this step changes in direction, and the others."""
        factors_L = self.method.factors().tolist()
        pulled = [layer for layer in layers if factors_L[layer] != 0.0 and self._projected[layer]]
        return pulled, sorted(set(layers) - set(pulled))

    def _measure(self, layer: int) -> torch.Tensor:
        """Statistics [1, K] of one layer, while backward runs."""
        views = self._views([layer])
        if self._previous is not None:
            self._previous.fill(list(views.values()), [layer])
        ((_, parts),) = self._walk(views, [layer])
        return self.method.statistics(parts)

    def _inspect(self, stats_LK: torch.Tensor) -> float:
        """Fill the report from reduced statistics; return the clipping factor (1 = none)."""
        finite_L = torch.isfinite(stats_LK[:, S.GRAD_SQ])
        broken = (finite_L & ~torch.isfinite(stats_LK[:, S.DISPLACEMENT_SQ])).nonzero().flatten().tolist()
        if broken:
            raise _not_finite(self.backend.specs[broken[0]].name)
        names = [spec.name for spec, finite in zip(self.backend.specs, finite_L.tolist(), strict=True) if not finite]
        norm = math.sqrt(float(stats_LK[:, S.GRAD_SQ].sum())) if not names else math.nan
        before_clipping = self.backend.grad_norm_before_clipping()
        # An engine's norm is one of all layers, also of those that rest.
        self._start_report(norm if before_clipping is None or any(self._resting) else before_clipping, names)
        if names or self._max_grad_norm is None:
            return 1.0
        # torch.nn.utils.clip_grad_norm_'s formula.
        return min(1.0, self._max_grad_norm / (norm + 1e-6))

    def _start_report(self, grad_norm: float, nonfinite_layers: list[str]) -> None:
        self.report = StepReport(
            step=self.report.step + 1,
            grad_norm=grad_norm,
            conflict_rate=0.0,
            strength_mean=self.report.strength_mean,
            skipped=bool(nonfinite_layers),
            nonfinite_layers=nonfinite_layers,
        )

    def _summarize(self) -> None:
        count = max(1, int(self._projected_L.sum()))
        self.report.conflict_rate = float((self.method.conflict() & self._projected_L).sum()) / count
        self.report.strength_mean = float(self.method.strength()[self._projected_L].double().sum()) / count

    # For users.

    def strength(self) -> dict[str, float]:
        """ω of every layer that has a reference, by parameter name (as in the unwrapped model)."""
        values = self.method.strength().tolist()
        return {
            spec.name: values[layer] for layer, spec in enumerate(self.backend.specs) if bool(self._projected_L[layer])
        }

    def state_dict(self, *, gathered: bool = True, keep: bool = True) -> dict[str, Any]:
        """Everything that a resumed run needs, by parameter name: independent of world size and backend.

        Under sharding this is a collective: all ranks call it, and the weights before the last step (kept by methods that
        look back at them) are gathered into full float tensors on the CPU, all of them on every rank: a whole model's size.
        A rank that writes nothing passes ``keep=False`` and holds one of them at a time. With ``gathered=False`` it is no
        collective, and they are this rank's flat parts, aliased.
        """
        names = [spec.name for spec in self.backend.specs]
        scalars, layers = {}, {}
        for key, value in self.method.state().items():
            if isinstance(value, torch.Tensor):
                layers[key] = dict(zip(names, value.unbind(), strict=True))
            else:
                scalars[key] = value
        before = {"previous": {}, "last_step": {}} if self._previous is None else self._previous.state(gathered, keep)
        return {
            "method": self.method.name,
            "step": self.report.step,
            "scalars": scalars,
            "layers": layers,
            **before,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, gathered: bool = True) -> None:
        """The inverse of ``state_dict``, on any backend and world size (with ``gathered=False``: of this rank's parts).

        Raises:
            CheckpointError: the state is of another method, or of other layers.
        """
        expected = ("method", "step", "scalars", "layers", "previous", "last_step")
        missing = [key for key in expected if key not in state]
        if missing:
            raise CheckpointError(f"method state: expected the keys {', '.join(expected)}; {missing[0]} is missing")
        if state["method"] != self.method.name:
            raise CheckpointError(f"method state is of {state['method']!r}, expected {self.method.name!r}")
        names = [spec.name for spec in self.backend.specs]
        restored: dict[str, Any] = dict(state["scalars"])
        for key, values in state["layers"].items():
            differing = sorted(set(values) ^ set(names))
            if differing:
                raise CheckpointError(
                    f"method state: {len(differing)} layers differ between the state and the model, first {differing[0]!r}"
                )
            restored[key] = torch.stack([values[name] for name in names])
        if self._previous is not None:
            self._previous.load({key: state[key] for key in ("previous", "last_step")}, gathered)
        if restored:
            self.method.load(restored)
        self.report = StepReport(step=int(state["step"]))

    def summary(self) -> str:
        """One line: method, backend, how many layers have a reference, and what was chosen automatically."""
        previous = "" if self._previous is None else f", weights before the last step {self._previous.name}"
        step = ", projection in the optimizer's pass" if self.fused else ""
        early = ", statistics during backward" if self._early is not None else ""
        return (
            f"method {self.method.name} on {self.backend.name}: {int(self._projected_L.sum())} of "
            f"{len(self._projected_L)} layers have a reference ({self._reference.name}), {self.method.kernels.name} "
            f"kernels{previous}{step}{early}"
        )

    def held_tensors(self) -> list[torch.Tensor]:
        """The shards that the projector keeps beside the model: the reference, and the weights before the last step."""
        kept = [] if self._previous is None else self._previous.held_tensors()
        return self._reference.held_tensors() + kept

    def expect_step(self, last: bool) -> None:
        """Tell whether the backward that follows is the last one before the optimizer's step.

        Only for statistics during backward, and only to save time: without it they are taken in every micro-batch.
        """
        if self._early is not None:
            self._early.active = last

    def note_engine_skip(self) -> None:
        """Report a step that the engine itself skipped (overflow) before it called the optimizer. Collective."""
        self._start_report(math.inf, self.backend.nonfinite_layers() or ["(not known)"])

    def detach(self) -> None:
        """Remove the hooks; the optimizer is plain again."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        attached.difference_update([*self.backend.hooked, self.method])
        if self._early is not None:
            self._early.close()
        self._reference.close()
        self.backend.close()


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name}: its weights or their reference hold values that are not finite")


def _clipped(stats_LK: torch.Tensor, clip: float) -> torch.Tensor:
    """The statistics of clip · g, from those of g."""
    if clip == 1.0:
        return stats_LK
    scaled_LK = stats_LK.clone()
    scaled_LK[:, [S.GRAD_DISPLACEMENT, S.GRAD_PREVIOUS]] *= clip
    scaled_LK[:, S.GRAD_SQ] *= clip**2
    return scaled_LK
