"""transformers' ``Trainer``, and what is built on it (TRL's trainers, axolotl): a callback that attaches, logs and saves.

    trainer = Trainer(model, arguments, train_dataset=data)
    DigrapCallback(method="digrap", reference="path/to/pretrained", strength_lr=1e-2).add_to(trainer)
    trainer.train()

The optimizer exists, wrapped and with its checkpoint's state, when training begins: there ``attach`` is called.
"""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from digrap_scale.checkpoint.method_state import read_method_state, read_tensors, write_method_state
from digrap_scale.errors import CheckpointError, ConfigError
from digrap_scale.integrations.trl import check_head
from digrap_scale.projector import Projector, attach
from digrap_scale.sharding.base import Backend

STATE_FILE = "digrap_method.safetensors"
_TRAINER_STATE = "trainer_state.json"
_NORMS = "weight_norms"


class DigrapCallback(TrainerCallback):
    """Attaches a method to a Trainer's optimizer, whatever Trainer trains on: one process, DDP, FSDP2, DeepSpeed.

    Args:
        log_layers: put ω of every layer into the Trainer's logs, too, as ``strength/PARAMETER``.
        resume_from: of a resumed run: the Trainer's checkpoint that the method's state is read from. Empty: the string in
            ``TrainingArguments.resume_from_checkpoint``, or else the checkpoint of the resumed step in ``output_dir``.
        options: arguments of ``digrap_scale.attach``.

    Attributes:
        projector: of the training under way or the last one; None before the first.
    """

    def __init__(self, *, log_layers: bool = False, resume_from: str | Path | None = None, **options: Any) -> None:
        self.projector: Projector | None = None
        self._log_layers = log_layers
        self._resume_from = resume_from
        self._options = options
        self._trainer: weakref.ref[Trainer] | None = None

    def add_to(self, trainer: Trainer) -> DigrapCallback:
        """Add this callback to ``trainer``, before those that report (TensorBoard, W&B, …), which then see what it logs.

        A DeepSpeed engine can be reached in this way only: a Trainer hands its callbacks the bare model.
        """
        self._trainer = weakref.ref(trainer)
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach, and take up the method's state where the run is resumed.

        Raises:
            ConfigError: a combination that cannot work; the message says what to change.
            CheckpointError: the run is resumed, and the method's state is not beside the Trainer's.
        """
        self._refuse(args, state)
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            check_head(trainer)
            model, optimizer = trainer.model_wrapped, trainer.optimizer
        elif getattr(args, "deepspeed", None):
            raise ConfigError(
                "DigrapCallback: a Trainer hands its callbacks the model without its DeepSpeed engine; use "
                "DigrapCallback(...).add_to(trainer) in place of callbacks=[...]"
            )
        self._detach()
        self.projector = attach(model, optimizer, **self._options)
        if state.global_step > 0:
            file = self._saved(args, state)
            self.projector.load_state_dict(read_method_state(file))
            _check_weights(self.projector.backend, file)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the last step's figures to the line of a training step."""
        if self.projector is None or logs is None or "loss" not in logs:
            return
        report = self.projector.report
        added: dict[str, float] = {"strength_mean": report.strength_mean, "conflict_rate": report.conflict_rate}
        if "grad_norm" not in logs and math.isfinite(report.grad_norm):
            added["grad_norm"] = report.grad_norm
        if self._log_layers:
            added.update({f"strength/{name}": value for name, value in self.projector.strength().items()})
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)  # made before callbacks see the line

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the method's state into the Trainer's checkpoint. Collective. Raises: SaveError, CheckpointError."""
        if self.projector is None:
            return
        writes = state.is_world_process_zero or (args.save_on_each_node and state.is_local_process_zero)
        gathered, norms = self.projector.state_dict(keep=writes), _weight_norms(self.projector.backend)
        if not writes:
            return
        folder = _checkpoint(args, state)
        if not (folder / _TRAINER_STATE).is_file():
            raise CheckpointError(
                f"{folder}: expected the checkpoint that the Trainer has just saved, with its {_TRAINER_STATE}; "
                "hyper-parameter search is not supported with DigrapCallback"
            )
        write_method_state(folder / STATE_FILE, gathered, {_NORMS: json.dumps(norms)})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The optimizer is plain again; ``projector`` still tells ω."""
        self._detach()

    def _detach(self) -> None:
        if self.projector is not None:
            self.projector.detach()

    def _refuse(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._options.get("max_grad_norm") is not None and args.max_grad_norm:
            raise ConfigError(
                f"DigrapCallback: max_grad_norm={self._options['max_grad_norm']}, and the Trainer clips to {args.max_grad_norm} "
                "before; leave it out here, or set TrainingArguments.max_grad_norm=0"
            )
        if state.global_step > 0 and self._options.get("reference") == "initial":
            raise ConfigError(
                f"DigrapCallback: reference='initial' means the weights as they are now, and this run goes on from step "
                f"{state.global_step}; give the folder of the pre-trained weights"
            )

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The method's state in the checkpoint that the Trainer goes on from."""
        named = self._resume_from or args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, (str, Path)) else _checkpoint(args, state)
        advice = "give the checkpoint that the Trainer resumes from as DigrapCallback(resume_from=...)"
        if not (folder / STATE_FILE).is_file():
            raise CheckpointError(
                f"{folder / STATE_FILE}: not found; {advice}, or start anew (it was saved without a method)"
            )
        saved = TrainerState.load_from_json(str(folder / _TRAINER_STATE))
        if (saved.global_step, saved.log_history) != (state.global_step, state.log_history):
            raise CheckpointError(
                f"{folder}: it is not the checkpoint that the Trainer resumed (steps {saved.global_step} and "
                f"{state.global_step}, {len(saved.log_history)} and {len(state.log_history)} lines of history); {advice}"
            )
        return folder / STATE_FILE


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


@torch.no_grad()
def _weight_norms(backend: Backend) -> dict[str, float]:
    """L2 norm of every layer's weights, by name. Collective."""
    squares_LK = torch.stack([weight.double().square().sum() for weight in backend.weights()]).unsqueeze(1)
    backend.reduce_(squares_LK, range(len(backend.specs)))
    norms = squares_LK.sqrt().flatten().tolist()
    return {spec.name: norm for spec, norm in zip(backend.specs, norms, strict=True)}


def _check_weights(backend: Backend, file: Path) -> None:
    """Whether the Trainer has put the weights back: of models whose names transformers maps on loading it does not, and
    only warns of keys that are missing. Collective.

    Raises:
        CheckpointError: it has not, on all ranks.
    """
    now = _weight_norms(backend)
    then: dict[str, float] = json.loads(read_tensors(file)[1].get(_NORMS, "{}"))
    differing = [name for name, norm in now.items() if not math.isclose(norm, then.get(name, math.nan), rel_tol=1e-6)]
    if differing:
        raise CheckpointError(
            f"{file.parent}: after resuming, the weights of {len(differing)} of {len(now)} layers are not the saved ones "
            f"(‖{differing[0]}‖ is {now[differing[0]]:.6g}, expected {then.get(differing[0], math.nan):.6g}): the Trainer did "
            f"not load them; build the model by from_pretrained({str(file.parent)!r}) before resuming"
        )
