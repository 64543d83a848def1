"""``attach``: put a method, a backend and a reference together, and refuse what cannot work, with what to change."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from digrap_scale.errors import ConfigError
from digrap_scale.method.base import Method
from digrap_scale.method.build import build_method
from digrap_scale.method.choice import choose_kernels
from digrap_scale.method.kernels import Kernels
from digrap_scale.method.native import NativeKernels
from digrap_scale.projector.projector import Projector, attached
from digrap_scale.reference.names import tied_aliases
from digrap_scale.reference.placement import HeldReference, ReferenceShards
from digrap_scale.reference.resolve import DEFAULT_BUFFER_BYTES, Reference, resolve_reference
from digrap_scale.sharding.base import Backend, unwrapped_name
from digrap_scale.sharding.build import detect_backend, is_deepspeed_engine, unwrap
from digrap_scale.sharding.previous import (
    KeptDirections,
    KeptWeights,
    PreviousWeights,
    RecomputedWeights,
    can_recompute,
)

logger = logging.getLogger(__name__)


def attach(
    model: Any,
    optimizer: Optimizer | None = None,
    *,
    method: str | Method | None = "digrap",
    reference: Reference | None = None,
    reference_placement: Literal["device", "cpu", "stream"] = "device",
    reference_buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    reference_rename: Mapping[str, str] | None = None,
    not_projected: Sequence[str] = (),
    max_grad_norm: float | None = None,
    previous: Literal["auto", "stored", "recomputed"] = "auto",
    kernels: Literal["auto", "eager", "compile", "native"] = "auto",
    projection: Literal["separate", "fused"] = "separate",
    statistics: Literal["step", "backward"] = "step",
    **method_options: Any,
) -> Projector:
    """Attach a method to an optimizer; nothing else in the training loop changes.

    Args:
        model: a plain module, a DDP module, one sharded by ``fully_shard``, or a DeepSpeed engine (ZeRO 1, 2, 3).
        optimizer: the torch optimizer of the model's parameters; None for a DeepSpeed engine (its own is taken).
        method: a name (``digrap``, ``digrap_update``, ``l2sp``, ``pcgrad``, ``spd``, ``ftp``, ``linear_probe``,
            ``lp_ft``, ``none``), an instance from
            ``digrap_scale.method``, or None (plain; still clips, skips non-finite steps and reports).
        reference: θ₀. ``"initial"`` (a sharded copy of the weights as they are now); a safetensors file, index or
            folder; a mapping of parameter name → full tensor (names absent from it are not projected); ``"zero"``; or
            None: zero for LoRA adapters, an error for other parameters. With a path or a mapping, LoRA adapters have
            reference zero, too.
        reference_placement: where a rank keeps its slices: ``"device"`` (beside the weights), ``"cpu"``, or ``"stream"``:
            nowhere, they are read from their file in each step (the file must stay as it is).
        reference_buffer_bytes: of a streamed reference: host memory that it is read through.
        reference_rename: regex → replacement, from parameter names to the file's names, where they differ.
        not_projected: regexes of parameters that have no reference (a new head).
        max_grad_norm: clip the global gradient norm before the projection, from the same reduction.
        previous: where d_{t-1} comes from: ``"stored"`` (one more copy of the shards), ``"recomputed"`` (from the moments
            of torch's AdamW or Adam: no memory), or ``"auto"``: recomputed where it can be.
        kernels: how layers are walked: ``"native"`` (C++, for shards on the CPU), ``"compile"`` (torch.compile),
            ``"eager"``, or ``"auto"``: native on the CPU where a C++ compiler is there, on accelerators compiled where a rank
            holds 32 M trained elements or more. The choice is logged.
        projection: ``"separate"``: gradients are changed before the optimizer's step; ``"fused"``: the hook takes the step
            of torch's AdamW or Adam itself, with the projection in the same pass over memory, and leaves the state that
            they would have left. Either way gradients are used up by the step: afterwards they are neither the raw nor
            all the projected ones.
        statistics: ``"step"``, or ``"backward"``: those of large layers are taken while backward runs, as soon as their
            gradient is there (one process or FSDP2). With accumulation, see ``Projector.expect_step``.
        method_options: arguments of the method given by name (``strength_lr=1e-2``).

    Returns:
        The projector: ``report``, ``strength()``, ``state_dict()``, ``load_state_dict()``, ``detach()``.

    Raises:
        ConfigError: a combination that cannot work; the message says what to change.
        CheckpointError: the reference does not fit the model; the message is the whole diff.
    """
    chosen = _method(method, method_options)
    _check_options(model, reference_placement, max_grad_norm, statistics)
    backend = detect_backend(model, optimizer)
    if any(hooked in attached for hooked in backend.hooked):
        raise ConfigError("attach: this optimizer has a projector already; call its detach() first")
    if chosen in attached:
        raise ConfigError(
            f"attach: this {chosen.name} is attached already, and holds that optimizer's state; call its projector's "
            "detach() first, or make another"
        )
    module = unwrap(model)
    chosen.kernels = _kernels(kernels, backend)
    fused = _fused(projection, backend)
    recompute = _recomputes(previous, chosen, backend)
    exempt = _matching(not_projected, [spec.name for spec in backend.specs])
    held: ReferenceShards = HeldReference([None] * len(backend.specs), "none")
    projected_L = torch.zeros(len(backend.specs), dtype=torch.bool)
    if chosen.uses_reference:
        aliases = {
            unwrapped_name(name): [unwrapped_name(alias) for alias in names]
            for name, names in tied_aliases(module).items()
        }
        held, projected = resolve_reference(
            reference,
            module,
            backend.specs,
            backend.weights(),
            aliases,
            reference_rename or {},
            exempt,
            reference_placement,
            reference_buffer_bytes,
        )
        projected_L = torch.tensor(projected)
        if chosen.returns_to_reference:
            _refuse_zeros(chosen, held, [spec.name for spec in backend.specs], projected)
    weights_before: PreviousWeights | None = None
    if chosen.needs_previous:
        kept = KeptDirections if chosen.keeps_directions else KeptWeights
        weights_before = (RecomputedWeights if recompute else kept)(backend, projected_L)
    projector = Projector(
        backend,
        chosen,
        held,
        projected_L,
        weights_before,
        max_grad_norm=max_grad_norm,
        fused=fused,
        early=statistics == "backward",
    )
    if chosen.rests_layers:
        try:
            _check_resting(model, backend, chosen)
        except ConfigError:
            projector.detach()
            raise
    logger.info(projector.summary())
    return projector


def _kernels(choice: str, backend: Backend) -> Kernels:
    """The same on all ranks: replicas, and tensors that every rank steps for itself, must stay equal in every bit."""
    # Of equal shares, also where shards are uneven.
    elements = sum(math.prod(spec.shape) for spec in backend.specs) // backend.shard_ranks
    kernels, failed = Kernels(), None
    try:
        kernels = choose_kernels(choice, elements, backend.weights()[0].device)
    except ValueError as error:
        failed = error
    if not backend.everywhere(failed is None):
        raise ConfigError(
            f"attach: {failed or 'kernels: native cannot be built on another rank; use eager'}"
        ) from failed
    native = isinstance(kernels, NativeKernels)
    if not backend.everywhere(native) and native:
        warnings.warn("digrap-scale: eager kernels on all ranks: one of them cannot build native ones", stacklevel=3)
        kernels = Kernels()
    return kernels


def _check_options(model: Any, reference_placement: str, max_grad_norm: float | None, statistics: str) -> None:
    if reference_placement not in ("device", "cpu", "stream"):
        raise ConfigError(f"reference_placement: expected 'device', 'cpu' or 'stream', found {reference_placement!r}")
    if statistics not in ("step", "backward"):
        raise ConfigError(f"statistics: expected 'step' or 'backward', found {statistics!r}")
    if statistics == "backward" and reference_placement == "stream":
        raise ConfigError(
            "statistics='backward' needs the reference in memory when a gradient comes; set reference_placement to "
            "'device' or 'cpu', or statistics to 'step'"
        )
    if max_grad_norm is None:
        return
    if not max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm: expected a positive number, found {max_grad_norm}")
    if is_deepspeed_engine(model) and model.gradient_clipping() > 0:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}: the engine clips to {model.gradient_clipping()} already; set "
            '"gradient_clipping": 0 in the DeepSpeed config, or leave max_grad_norm out'
        )


def _recomputes(choice: str, method: Method, backend: Backend) -> bool:
    """Whether the weights before the last step are computed again, not kept (for a method that looks back at them)."""
    if choice not in ("auto", "stored", "recomputed"):
        raise ConfigError(f"previous: expected 'auto', 'stored' or 'recomputed', found {choice!r}")
    if not method.needs_previous:
        return False
    obstacle = f"{method.name} acts on the update itself" if method.acts_on_update else can_recompute(backend)
    if choice == "recomputed" and obstacle is not None:
        raise ConfigError(f"previous='recomputed': {obstacle}; use 'stored'")
    return choice != "stored" and obstacle is None


def _fused(choice: str, backend: Backend) -> bool:
    """Whether the hook takes the optimizer's step itself."""
    if choice not in ("separate", "fused"):
        raise ConfigError(f"projection: expected 'separate' or 'fused', found {choice!r}")
    obstacle = can_recompute(backend) if choice == "fused" else None
    if obstacle is not None:
        raise ConfigError(f"projection='fused': {obstacle}; use 'separate'")
    return choice == "fused"


def _method(method: str | Method | None, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"attach: {', '.join(options)}: options go with a method's name, not with an instance")
        return method
    return build_method("none" if method is None else method, **options)


def _check_resting(model: Any, backend: Backend, method: Method) -> None:
    """Raises: ConfigError where layers cannot rest by themselves."""
    resting = set(method.resting().nonzero().flatten().tolist())
    if (mixed := backend.together(resting)) is not None:
        rests, trains = (backend.specs[layer].name for layer in mixed)
        raise ConfigError(
            f"{method.name} on {backend.name}: {trains} trains and {rests} rests, but DeepSpeed steps them as one tensor; put "
            "the head into a parameter group of its own"
        )
    if resting and is_deepspeed_engine(model) and model.gradient_clipping() > 0:
        raise ConfigError(
            f"{method.name}: the engine would clip by the gradient norm of layers that rest, too; set "
            '"gradient_clipping": 0 in the DeepSpeed config, and max_grad_norm here'
        )


def _refuse_zeros(method: Method, held: ReferenceShards, names: Sequence[str], projected: Sequence[bool]) -> None:
    zeros = [name for layer, name in enumerate(names) if projected[layer] and held.is_zero(layer)]
    if zeros:
        raise ConfigError(
            f"reference: it is zero for {len(zeros)} layers ({zeros[0]}, …), and {method.name} puts weights back to it: they "
            "would never learn; use reference='initial'"
        )


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if re.search(pattern, name)}
        if not matched:
            raise ConfigError(f"not_projected: {pattern!r} matches no trained parameter (they are {names[0]!r}, …)")
        found |= matched
    return found
