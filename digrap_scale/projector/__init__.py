"""Where method, backend and reference meet: inside ``optimizer.step()``, in torch's optimizer step hooks."""

from digrap_scale.projector.attach import attach
from digrap_scale.projector.projector import Projector
from digrap_scale.projector.report import StepReport

__all__ = ["Projector", "StepReport", "attach"]
