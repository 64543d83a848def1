"""A run's whole state: what a checkpoint is made of, and a run that goes on from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.dcp import StoredParts
from digrap_scale.checkpoint.layout import Checkpoint
from digrap_scale.checkpoint.method_state import method_tensors, read_method_state, read_tensors
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.checkpoint.rng import capture_generators, restore_generators
from digrap_scale.checkpoint.save import Contents
from digrap_scale.config import Config, dump_config
from digrap_scale.errors import CheckpointError
from digrap_scale.projector import Projector
from digrap_scale.reference.identity import reference_identity
from digrap_scale.sharding.parts import (
    OptimizerLoading,
    buffer_parts,
    describe_engine,
    frozen_parts,
    load_buffers,
    optimizer_parts,
    part_of,
    trained_parts,
)
from digrap_scale.training.build_run import BuiltRun
from digrap_scale.training.final import save_small_files
from digrap_scale.training.setup import Place, seed_everything
from digrap_scale.types import WEIGHTS, TensorPart

PREVIOUS = "method.previous."
_PACKAGES = {"digrap_scale": "digrap-scale", **{name: name for name in ("torch", "transformers", "peft", "deepspeed")}}


class RunState:
    """A run that is built and attached, as something to save and to load.

    Args:
        run: model, engine and task.
        projector: attached to the engine.
        config: the run's.
        here: this process's place.
        total_steps: of the run.
    """

    def __init__(self, run: BuiltRun, projector: Projector, config: Config, here: Place, total_steps: int) -> None:
        self._run, self._projector, self._config, self._here = run, projector, config, here
        self._total_steps = total_steps
        self._reference = here.on_rank_0(lambda: identity_of(config, run.built.checkpoint_folder))

    @torch.no_grad()
    def contents(self, step: int, data: dict[str, Any]) -> Contents:
        """What a checkpoint after ``step`` is made of; tensors alias the live ones. ``data``: the loader's position."""
        engine, backend, config = self._run.engine, self._projector.backend, self._config
        method = self._projector.state_dict(gathered=False)
        by_name = {spec.name: spec for spec in backend.specs}
        parts = trained_parts(backend) + buffer_parts(engine) + optimizer_parts(backend)
        parts += [part_of(backend, by_name[name], PREVIOUS + name, kept) for name, kept in method["previous"].items()]
        parts = [part.own() for part in parts]
        described = describe_engine(engine, backend)
        if config.checkpoint.frozen_weights:
            parts += frozen_parts(engine, backend)
        else:
            described["frozen_elsewhere"], described["frozen"] = described["frozen"], []
        state = {
            "format": layout.FORMAT,
            "step": step,
            "total_steps": self._total_steps,
            "backend": config.sharding.backend,
            "world_size": self._here.world_size,
            "accumulation_steps": engine.accumulation_steps,
            "micro_batch_samples": engine.micro_batch_samples,
            "model_class": self._run.model_class.__name__,
            "frozen_elsewhere": [],
            **described,
            "data": data,
            "reference": self._reference,
            "engine": engine.extra_state(),
            "versions": _versions(),
        }
        method_of_layers, method_notes = method_tensors(method, previous=False)
        return Contents(
            step=step,
            state=state,
            config=dump_config(config),
            parts=parts,
            method=method_of_layers,
            method_notes=method_notes,
            generators=capture_generators(),
            write_model=lambda folder: save_small_files(self._run, folder),
            write_native=engine.native_writer() if config.checkpoint.deepspeed_native else None,
        )

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, ranks: Ranks, message: Callable[[str], None]) -> None:
        """Put the checkpoint's state into model, optimizer, method and random generators. Collective.

        Raises:
            CheckpointError: it is of another model, optimizer, method or reference, on every rank.
        """
        ranks.together(lambda: self._check(checkpoint))
        ranks.together(lambda: self._read(checkpoint))
        self._projector.backend.weights_changed()
        ranks.together(lambda: self._restore_generators(checkpoint, message))

    def _read(self, checkpoint: Checkpoint) -> None:
        folder, state = checkpoint.folder, checkpoint.state
        engine, projector = self._run.engine, self._projector
        backend = projector.backend
        stored = StoredParts(folder / layout.DCP)
        optimizer = OptimizerLoading(backend, stored.shapes)
        previous = {
            spec.name: torch.empty_like(weight)
            for spec, weight in zip(backend.specs, backend.weights(), strict=True)
            if PREVIOUS + spec.name in stored.shapes
        }
        by_name = {spec.name: spec for spec in backend.specs}
        parts = trained_parts(backend) + optimizer.parts
        parts += [part_of(backend, by_name[name], PREVIOUS + name, kept) for name, kept in previous.items()]
        buffers = [_room(part) for part in buffer_parts(engine)]
        frozen = frozen_parts(engine, backend) if state["frozen"] else []
        # Not on the device, which may have no room for a second copy of them.
        frozen_stored = [_room(part, "cpu") for part in frozen]
        stored.read(parts + buffers + frozen_stored)
        _refuse_other_base(folder, frozen, frozen_stored)
        load_buffers(engine, buffers)
        optimizer.finish()
        projector.load_state_dict({**read_method_state(folder / layout.METHOD), "previous": previous}, gathered=False)
        engine.load_extra_state(state["engine"])

    def _restore_generators(self, checkpoint: Checkpoint, message: Callable[[str], None]) -> None:
        here = self._here
        if here.world_size != checkpoint.state["world_size"]:
            # Each rank's own stream belongs to its place among so many: new ones, that depend on the step.
            seed_everything(self._config.run.seed + checkpoint.step, here.rank)
            message(
                f"step-{checkpoint.step} was saved by {checkpoint.state['world_size']} processes, this run has "
                f"{here.world_size}: dropout draws other numbers from here on"
            )
            return
        restore_generators(read_tensors(layout.rng_file(checkpoint.folder, here.rank))[0])

    def _check(self, checkpoint: Checkpoint) -> None:
        folder, state = checkpoint.folder, checkpoint.state
        described = describe_engine(self._run.engine, self._projector.backend)
        try:
            for what, trained in (("trained", True), ("frozen", False)):
                saved = {*state[what], *(() if trained else state["frozen_elsewhere"])}
                differing = sorted(saved ^ set(described[what]))
                if differing:
                    where = "only in the checkpoint" if differing[0] in saved else "only in the run"
                    raise CheckpointError(
                        f"{folder}: {len(differing)} {what} parameters differ from the run's, first {differing[0]!r} ({where}); "
                        f"resume with the {'model, freezing and adapters' if trained else 'model'} of then"
                    )
            then, now = state["optimizer"]["name"], described["optimizer"]["name"]
            if then != now:
                raise CheckpointError(
                    f"{folder}: its optimizer is {then}, the run's is {now}; resume with the one of then"
                )
            if self._here.rank == 0:
                then, now = _named(state["reference"]), _named(self._reference)
                if then[1] != now[1]:
                    raise CheckpointError(
                        f"{folder}: its reference was {then[0]} (identity {then[1]}), the run's is {now[0]} ({now[1]}); set "
                        "reference.source to the one of then"
                    )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / layout.STATE}: expected the key {error}; it is damaged or not ours"
            ) from error


def identity_of(config: Config, pretrained: Path) -> dict[str, str] | None:
    """Where the reference is and which it is; None if it is zero."""
    source = config.reference.source
    if source == "zero":
        return None
    path = pretrained if source in ("pretrained", "initial") else Path(source)
    return {"source": str(path), "sha256": reference_identity(path)}


def _named(reference: Mapping[str, str] | None) -> tuple[str, str]:
    return ("zero", "none") if reference is None else (reference["source"], reference["sha256"][:12])


def _room(part: TensorPart, device: str | None = None) -> TensorPart:
    """The same part with memory of its own."""
    return TensorPart(part.key, part.shape, part.start, part.stop, torch.empty_like(part.tensor, device=device))


def _refuse_other_base(folder: Path, live: list[TensorPart], stored: list[TensorPart]) -> None:
    for ours, saved in zip(live, stored, strict=True):
        # Bit for bit: a NaN is not equal to itself.
        if not torch.equal(ours.tensor.view(torch.uint8).cpu(), saved.tensor.view(torch.uint8)):
            name = ours.key.removeprefix(WEIGHTS)
            raise CheckpointError(
                f"{folder}: the frozen weight {name} differs from that of model.path; resume with the model of then"
            )


def _versions() -> dict[str, str]:
    found = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # DeepSpeed is optional
    return found
