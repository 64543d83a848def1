"""digrap-scale: robust fine-tuning of vision-language models by directional gradient projection, on sharded gradients."""

from digrap_scale.errors import CheckpointError, ConfigError, DigrapError, PeerError, SaveError
from digrap_scale.projector import Projector, StepReport, attach
from digrap_scale.version import __version__

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DigrapError",
    "PeerError",
    "Projector",
    "SaveError",
    "StepReport",
    "__version__",
    "attach",
]
