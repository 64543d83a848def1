"""WiSE-FT at a run's end: the model with θ = (1 − α)·θ₀ + α·θ_T, for each α (Wortsman et al. 2022, arXiv 2109.01903).

The live model's shards are changed in place, so that it works on every backend, takes one more copy of the trained shards
and no files. ``digrap-scale interpolate`` writes the same weights into folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from digrap_scale.checkpoint.interpolate import mix
from digrap_scale.config import Config
from digrap_scale.config.schema import REFERENCE_WORDS
from digrap_scale.errors import ConfigError
from digrap_scale.evaluation.report import ReportRow
from digrap_scale.reference.names import tied_aliases
from digrap_scale.reference.placement import ReferenceShards
from digrap_scale.reference.resolve import resolve_reference
from digrap_scale.sharding.base import Backend, unwrapped_name
from digrap_scale.training.build_run import BuiltRun
from digrap_scale.training.evaluate import EvaluationData, evaluate_run
from digrap_scale.training.setup import Place


def check_interpolation(run: BuiltRun, config: Config) -> None:
    """Before training: whether there is something to interpolate with at its end.

    Raises:
        ConfigError: a parameter starts new.
    """
    if config.evaluation.interpolate_alphas and run.built.new_parameters:
        raise ConfigError(
            f"evaluation.interpolate_alphas: {min(run.built.new_parameters)} starts new, so there is nothing to interpolate it "
            "with; set model.path to the `final` folder of a linear_probe run, or remove interpolate_alphas"
        )


def interpolated_rows(
    run: BuiltRun, backend: Backend, config: Config, here: Place, data: EvaluationData
) -> list[ReportRow]:
    """A row of the table for each of ``evaluation.interpolate_alphas``; the weights are the run's again afterwards. Collective.

    Of an adapter A·B the product is interpolated, as of merged weights: B is multiplied by α.
    """
    if not config.evaluation.interpolate_alphas:
        return []
    evaluation = config.evaluation.model_copy(update={"shift_degree": None})
    rows = []
    with _interpolating(run, backend, config) as reference:
        for alpha in config.evaluation.interpolate_alphas:
            reference.set(alpha)
            result = evaluate_run(run, config.model_copy(update={"evaluation": evaluation}), here, data)
            rows.append(ReportRow(f"{config.method.name} α={alpha:g}", result))
    return rows


class _Interpolation:
    """The trained shards, and what they are interpolated with."""

    def __init__(self, backend: Backend, reference: ReferenceShards, layers: Sequence[int]) -> None:
        self._backend, self._reference, self._layers = backend, reference, list(layers)
        self._trained_L = {layer: backend.weights()[layer].clone() for layer in layers}

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """The model computes with (1 − α)·θ₀ + α·θ_T from here on. Collective."""
        weights_L = self._backend.weights()
        for pieces in self._reference.pieces(self._layers):
            for piece in pieces:
                trained = self._trained_L[piece.layer][piece.part]
                start = torch.zeros_like(trained) if piece.reference is None else piece.reference.to(trained.device)
                name = self._backend.specs[piece.layer].name
                weights_L[piece.layer][piece.part].copy_(mix(name, start, trained, alpha))
        self._backend.weights_changed()

    @torch.no_grad()
    def restore(self) -> None:
        """The model computes with the trained weights again. Collective."""
        weights_L = self._backend.weights()
        for layer, trained in self._trained_L.items():
            weights_L[layer].copy_(trained)
        self._backend.weights_changed()


@contextmanager
def _interpolating(run: BuiltRun, backend: Backend, config: Config) -> Iterator[_Interpolation]:
    source = config.reference.source
    path = run.built.checkpoint_folder if source in REFERENCE_WORDS else source
    module = run.engine.module
    aliases = {
        unwrapped_name(name): [unwrapped_name(alias) for alias in names] for name, names in tied_aliases(module).items()
    }
    held, _ = resolve_reference(
        path,
        module,
        backend.specs,
        backend.weights(),
        aliases,
        config.reference.rename,
        set(),
        "stream",
        config.reference.buffer_bytes,
    )
    moved = [layer for layer, spec in enumerate(backend.specs) if not _is_first_factor(spec.name)]
    interpolation = _Interpolation(backend, held, moved)
    try:
        yield interpolation
    finally:
        interpolation.restore()
        held.close()


def _is_first_factor(name: str) -> bool:
    """Whether it is the factor of an adapter that is not zero at first: B·A at α is (α·B)·A."""
    return any(part in ("lora_A", "lora_embedding_A") for part in name.split("."))
