"""Where method, backend and reference meet: inside ``optimizer.step()``, in torch's optimizer step hooks.

A step's walk, in the pre hook: views → statistics → one all-reduce → the method's per-layer update → gradients changed
in place; then the optimizer's own step; then, for methods that act on the update, the same walk once more.
Shapes: L layers, K statistics, N local elements.
"""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.method import statistics as S
from digrap_scale.method.base import Method
from digrap_scale.method.build import build_method
from digrap_scale.method.kernels import choose_kernels
from digrap_scale.reference.names import tied_aliases
from digrap_scale.reference.resolve import Reference, resolve_reference
from digrap_scale.sharding.base import Backend, unwrapped_name
from digrap_scale.sharding.build import detect_backend, is_deepspeed_engine, unwrap
from digrap_scale.sharding.previous import KeptWeights, PreviousWeights, RecomputedWeights, can_recompute
from digrap_scale.types import ShardView

logger = logging.getLogger(__name__)

# Optimizers that carry a projector: two of them would project twice.
_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@dataclass
class StepReport:
    """What the last optimizer step looked like.

    Attributes:
        step: how many steps the projector has seen, skipped ones included.
        grad_norm: global L2 norm of the gradient, before clipping and projection.
        conflict_rate: share of the layers with a reference that were in conflict.
        strength_mean: mean ω of the layers with a reference.
        skipped: the gradient was not finite, so weights, moments and ω are untouched.
        nonfinite_layers: the layers whose gradient was not finite.
    """

    step: int = 0
    grad_norm: float = 0.0
    conflict_rate: float = 0.0
    strength_mean: float = 0.0
    skipped: bool = False
    nonfinite_layers: list[str] = field(default_factory=list)


class Projector:
    """A method, attached to an optimizer. Made by ``attach``; its state is keyed by parameter name."""

    def __init__(
        self,
        backend: Backend,
        method: Method,
        reference_L: Sequence[torch.Tensor | None],
        projected_L: torch.Tensor,
        previous: PreviousWeights | None,
        max_grad_norm: float | None,
    ) -> None:
        self.backend = backend
        self.method = method
        self.report = StepReport()
        self._reference_L = reference_L
        self._projected_L = projected_L
        self._previous = previous
        self._max_grad_norm = max_grad_norm
        self._clip = 1.0
        self._idle = False
        method.prepare(projected_L)
        _attached.update(backend.hooked)
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in backend.hooked]
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in backend.hooked]

    # The walk.

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        backend, method = self.backend, self.method
        if backend.first_of_step():
            backend.unscale_()
            views = self._views()
            stats_LK = method.statistics(views)
            backend.reduce_(stats_LK)
            stats_LK = stats_LK.cpu()
            lr_L = torch.tensor([view.lr for view in views], dtype=torch.float64)
            # torch's get_/set_optimizer_state_dict make an optimizer's state by a step with gradient and rate 0.
            self._idle = not lr_L.any() and not stats_LK[:, S.GRAD_SQ].any()
            if not self._idle:
                self._clip = self._inspect(stats_LK)
                if not self.report.skipped:
                    method.update(_clipped(stats_LK, self._clip), lr_L)
                    self._summarize()
        if self._idle:
            return
        if self.report.skipped:
            backend.drop_gradients()
            return
        layers = backend.stepping()
        views = self._views(layers, look_back=False)
        method.apply_(views, layers, self._clip)
        backend.write_back()
        if self._previous is not None:
            self._previous.note_step(views, layers)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        backend, method = self.backend, self.method
        if method.acts_on_update and not self._idle and not self.report.skipped:
            layers = backend.stepping()
            views = self._views(layers)
            stats_LK = method.update_statistics(views)
            backend.reduce_(stats_LK)
            method.apply_update_(views, layers, stats_LK.cpu())
            self._summarize()
        backend.finish_step()

    # Its parts.

    def _views(self, layers: Sequence[int] | None = None, look_back: bool = True) -> list[ShardView]:
        """The backend's views with the reference, and the previous weights if wanted, filled in."""
        numbers = range(len(self.backend.specs)) if layers is None else layers
        views = self.backend.views(layers)
        for layer, view in zip(numbers, views, strict=True):
            reference = self._reference_L[layer]
            view.reference, view.projected = reference, bool(self._projected_L[layer])
        if look_back and self._previous is not None:
            self._previous.fill(views, numbers)
        return views

    def _inspect(self, stats_LK: torch.Tensor) -> float:
        """Fill the report from reduced statistics; return the clipping factor (1 = none)."""
        finite_L = torch.isfinite(stats_LK[:, S.GRAD_SQ])
        broken = (finite_L & ~torch.isfinite(stats_LK[:, S.DISPLACEMENT_SQ])).nonzero().flatten().tolist()
        if broken:
            name = self.backend.specs[broken[0]].name
            raise CheckpointError(f"{name}: its weights or their reference hold values that are not finite")
        names = [spec.name for spec, finite in zip(self.backend.specs, finite_L.tolist(), strict=True) if not finite]
        norm = math.sqrt(float(stats_LK[:, S.GRAD_SQ].sum())) if not names else math.nan
        before_clipping = self.backend.grad_norm_before_clipping()
        self._start_report(norm if before_clipping is None else before_clipping, names)
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, by parameter name: independent of world size and backend.

        Under sharding this is a collective: all ranks call it, and the weights before the last step (kept by methods that
        look back at them) are gathered into full float tensors on the CPU.
        """
        names = [spec.name for spec in self.backend.specs]
        scalars, layers = {}, {}
        for key, value in self.method.state().items():
            if isinstance(value, torch.Tensor):
                layers[key] = dict(zip(names, value.unbind(), strict=True))
            else:
                scalars[key] = value
        before = {"previous": {}, "last_step": {}} if self._previous is None else self._previous.state()
        return {
            "method": self.method.name,
            "step": self.report.step,
            "scalars": scalars,
            "layers": layers,
            **before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``, on any backend and world size.

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
            self._previous.load({key: state[key] for key in ("previous", "last_step")})
        if restored:
            self.method.load(restored)
        self.report = StepReport(step=int(state["step"]))

    def summary(self) -> str:
        """One line: method, backend, how many layers have a reference, and what was chosen automatically."""
        previous = "" if self._previous is None else f", weights before the last step {self._previous.name}"
        return (
            f"method {self.method.name} on {self.backend.name}: {int(self._projected_L.sum())} of "
            f"{len(self._projected_L)} layers have a reference, {self.method.kernels.name} kernels{previous}"
        )

    def held_tensors(self) -> list[torch.Tensor]:
        """The shards that the projector keeps beside the model: the reference, and the weights before the last step."""
        kept = [] if self._previous is None else self._previous.held_tensors()
        return [tensor for tensor in self._reference_L if tensor is not None] + kept

    def note_engine_skip(self) -> None:
        """Report a step that the engine itself skipped (overflow) before it called the optimizer. Collective."""
        self._start_report(math.inf, self.backend.nonfinite_layers() or ["(not known)"])

    def detach(self) -> None:
        """Remove the hooks; the optimizer is plain again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _attached.difference_update(self.backend.hooked)


def _clipped(stats_LK: torch.Tensor, clip: float) -> torch.Tensor:
    """The statistics of clip · g, from those of g."""
    if clip == 1.0:
        return stats_LK
    scaled_LK = stats_LK.clone()
    scaled_LK[:, [S.GRAD_DISPLACEMENT, S.GRAD_PREVIOUS]] *= clip
    scaled_LK[:, S.GRAD_SQ] *= clip**2
    return scaled_LK


def attach(
    model: Any,
    optimizer: Optimizer | None = None,
    *,
    method: str | Method | None = "digrap",
    reference: Reference | None = None,
    reference_placement: Literal["device", "cpu"] = "device",
    reference_rename: Mapping[str, str] | None = None,
    not_projected: Sequence[str] = (),
    max_grad_norm: float | None = None,
    previous: Literal["auto", "stored", "recomputed"] = "auto",
    kernels: Literal["auto", "eager", "compile"] = "auto",
    **method_options: Any,
) -> Projector:
    """Attach a method to an optimizer; nothing else in the training loop changes.

    Args:
        model: a plain module, a DDP module, one sharded by ``fully_shard``, or a DeepSpeed engine (ZeRO 1, 2, 3).
        optimizer: the torch optimizer of the model's parameters; None for a DeepSpeed engine (its own is taken).
        method: a name (``digrap``, ``digrap_update``, ``l2sp``, ``pcgrad``, ``spd``, ``none``), an instance from
            ``digrap_scale.method``, or None (plain; still clips, skips non-finite steps and reports).
        reference: θ₀. ``"initial"`` (a sharded copy of the weights as they are now); a safetensors file, index or
            folder; a mapping of parameter name → full tensor (names absent from it are not projected); ``"zero"``; or
            None: zero for LoRA adapters, an error for other parameters. With a path or a mapping, LoRA adapters have
            reference zero, too.
        reference_placement: where a rank keeps its slices: ``"device"`` (beside the weights) or ``"cpu"``.
        reference_rename: regex → replacement, from parameter names to the file's names, where they differ.
        not_projected: regexes of parameters that have no reference (a new head).
        max_grad_norm: clip the global gradient norm before the projection, from the same reduction.
        previous: where d_{t-1} comes from: ``"stored"`` (one more copy of the shards), ``"recomputed"`` (from the moments
            of torch's AdamW or Adam: no memory), or ``"auto"``: recomputed where it can be.
        kernels: how large layers are walked: ``"eager"``, ``"compile"`` (torch.compile), or ``"auto"``: compiled where a
            rank holds 32 M trained elements or more and a compiler is there. The choice is logged.
        method_options: arguments of the method given by name (``strength_lr=1e-2``).

    Returns:
        The projector: ``report``, ``strength()``, ``state_dict()``, ``load_state_dict()``, ``detach()``.

    Raises:
        ConfigError: a combination that cannot work; the message says what to change.
        CheckpointError: the reference does not fit the model; the message is the whole diff.
    """
    chosen = _method(method, method_options)
    _check_options(model, reference_placement, max_grad_norm)
    backend = detect_backend(model, optimizer)
    if any(hooked in _attached for hooked in backend.hooked):
        raise ConfigError("attach: this optimizer has a projector already; call its detach() first")
    module = unwrap(model)
    exempt = _matching(not_projected, [spec.name for spec in backend.specs])
    reference_L: list[torch.Tensor | None] = [None] * len(backend.specs)
    projected_L = torch.zeros(len(backend.specs), dtype=torch.bool)
    if chosen.uses_reference:
        aliases = {
            unwrapped_name(name): [unwrapped_name(alias) for alias in names]
            for name, names in tied_aliases(module).items()
        }
        reference_L, projected = resolve_reference(
            reference, module, backend.specs, backend.weights(), aliases, reference_rename or {}, exempt
        )
        projected_L = torch.tensor(projected)
        # Weights in bfloat16 are the checkpoint's, rounded: so is their reference, or d would start as rounding noise.
        reference_L = [
            tensor.to(weight.dtype) if tensor is not None and tensor.element_size() > weight.element_size() else tensor
            for tensor, weight in zip(reference_L, backend.weights(), strict=True)
        ]
        if reference_placement == "cpu":
            reference_L = [None if tensor is None else tensor.cpu() for tensor in reference_L]
    try:
        chosen.kernels = choose_kernels(kernels, sum(spec.numel for spec in backend.specs), backend.weights()[0].device)
    except ValueError as error:
        raise ConfigError(f"attach: {error}") from error
    weights_before = _previous(previous, chosen, backend, projected_L)
    projector = Projector(backend, chosen, reference_L, projected_L, weights_before, max_grad_norm)
    logger.info(projector.summary())
    return projector


def _check_options(model: Any, reference_placement: str, max_grad_norm: float | None) -> None:
    if reference_placement not in ("device", "cpu"):
        raise ConfigError(f"reference_placement: expected 'device' or 'cpu', found {reference_placement!r}")
    if max_grad_norm is None:
        return
    if not max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm: expected a positive number, found {max_grad_norm}")
    if is_deepspeed_engine(model) and model.gradient_clipping() > 0:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}: the engine clips to {model.gradient_clipping()} already; set "
            '"gradient_clipping": 0 in the DeepSpeed config, or leave max_grad_norm out'
        )


def _previous(choice: str, method: Method, backend: Backend, projected_L: torch.Tensor) -> PreviousWeights | None:
    """How the weights before the last step are had, or None for a method that does not look back."""
    if choice not in ("auto", "stored", "recomputed"):
        raise ConfigError(f"previous: expected 'auto', 'stored' or 'recomputed', found {choice!r}")
    if not method.needs_previous:
        return None
    obstacle = f"{method.name} acts on the update itself" if method.acts_on_update else can_recompute(backend)
    if choice == "recomputed" and obstacle is not None:
        raise ConfigError(f"previous='recomputed': {obstacle}; use 'stored'")
    recompute = choice != "stored" and obstacle is None
    return RecomputedWeights(backend, projected_L) if recompute else KeptWeights(backend, projected_L)


def _method(method: str | Method | None, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"attach: {', '.join(options)}: options go with a method's name, not with an instance")
        return method
    return build_method("none" if method is None else method, **options)


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if re.search(pattern, name)}
        if not matched:
            raise ConfigError(f"not_projected: {pattern!r} matches no trained parameter (they are {names[0]!r}, …)")
        found |= matched
    return found
