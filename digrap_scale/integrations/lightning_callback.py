"""Lightning: a callback that attaches when the strategy has wrapped model and optimizer, logs, and saves with checkpoints.

    trainer = lightning.Trainer(callbacks=[DigrapCallback(reference="path/to/pretrained", strength_lr=1e-2)])

Parameters have the names that they have in the LightningModule (``model.…``). A transformers model in it is found, and its
names in a file; for another model's file, give ``reference_rename={"^model\\.": ""}``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from digrap_scale.errors import ConfigError
from digrap_scale.projector import Projector, attach


class DigrapCallback(Callback):
    """Attaches a method to the one optimizer of a LightningModule, on the strategies auto, DDP, FSDP2 and DeepSpeed.

    Its state is in Lightning's own checkpoints, by parameter name: a run may go on with another strategy.

    Args:
        options: arguments of ``digrap_scale.attach``.

    Attributes:
        projector: of the training under way or the last one; None before the first.
    """

    def __init__(self, **options: Any) -> None:
        self.projector: Projector | None = None
        self._options = options
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and take up the method's state where the run is resumed.

        Raises:
            ConfigError: several optimizers, or see ``attach``.
            CheckpointError: the state does not fit.
        """
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"DigrapCallback: expected one optimizer, found {len(trainer.optimizers)}; call digrap_scale.attach for each in "
                "the module's on_train_start"
            )
        resumed = trainer.global_step > 0
        if resumed and self._restored is None:
            raise ConfigError(
                f"DigrapCallback: the run goes on from step {trainer.global_step}, and its checkpoint has no state of a method; "
                "start anew, or resume without the callback"
            )
        if resumed and self._options.get("reference") == "initial":
            raise ConfigError(
                f"DigrapCallback: reference='initial' means the weights as they are now, and this run goes on from step "
                f"{trainer.global_step}; give the folder of the pre-trained weights"
            )
        self._detach()
        self.projector = attach(trainer.strategy.model, trainer.optimizers[0], **self._options)
        if resumed and self._restored is not None:
            self.projector.load_state_dict(self._restored)
        self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the last step's figures under ``digrap/``."""
        assert self.projector is not None
        report = self.projector.report
        for name in ("strength_mean", "conflict_rate", "grad_norm"):
            pl_module.log(f"digrap/{name}", float(getattr(report, name)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is plain again; ``projector`` still tells ω."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The method's state, plain tensors and numbers. Collective: Lightning calls it on all ranks."""
        return {} if self.projector is None else self.projector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._restored = state_dict

    def _detach(self) -> None:
        if self.projector is not None:
            self.projector.detach()
