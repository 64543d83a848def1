"""DeepSpeed engines that no backend can see through say so when a projector is attached, and what to change.

Most of them need hardware or libraries that are not here: stand-ins with the attributes that DeepSpeed's own objects have.
"""

from __future__ import annotations

from typing import Any

import pytest

from digrap_scale.errors import ConfigError
from digrap_scale.sharding.zero import _OTHER_OPTIMIZERS, check_engine


def engine(
    kind: str = "DeepSpeedZeroOptimizer_Stage3",
    inner: str = "AdamW",
    stage: int = 3,
    name: str = "DeepSpeedEngine",
    **more: Any,
) -> Any:
    """An engine whose optimizer is a ``kind`` around an ``inner``; ``more`` are attributes of the optimizer."""
    optimizer = type(kind, (), {})()
    vars(optimizer).update(more, optimizer=type(inner, (), {})())
    base = type("DeepSpeedEngine", (), {})
    cls = base if name == "DeepSpeedEngine" else type(name, (base,), {})
    made = cls()
    vars(made).update(zero_optimization_stage=lambda: stage, optimizer=optimizer)
    return made


CASES = {
    "zenflow": (engine(zenflow=True), "ZenFlow is not supported; remove zero_optimization.zenflow"),
    "nvme": (engine(swap_optimizer=True), "set offload_optimizer.device to cpu"),
    "partial": (engine(offload_optimizer=True, partial_offload=0.5), "set offload_optimizer.ratio to 1.0"),
    "superoffload": (engine("SuperOffloadOptimizer_Stage3"), "remove super_offload from offload_optimizer"),
    "mics": (engine("MiCS_Optimizer"), "remove zero_optimization.mics_shard_size"),
    "unknown": (engine("SomethingNew"), "its optimizer SomethingNew is not supported; expected one of"),
    "half precision": (engine("FP16_Optimizer", stage=0), "set zero_optimization.stage to 1, 2 or 3"),
    "one bit": (engine("DeepSpeedZeroOptimizer", "OnebitAdam", 1), "OnebitAdam reduces gradients in its own step"),
    "muon": (engine("DeepSpeedZeroOptimizer", "MuonWithAuxAdam", 2), "MuonWithAuxAdam replaces gradients"),
    "pipeline": (engine(name="PipelineEngine"), "pass the model without PipelineModule"),
    "tensor parallel": (engine(model_parallel_world_size=2), "remove mpu and tensor_parallel"),
    "no optimizer": (engine("DummyOptim"), "the engine has no optimizer; pass one to deepspeed.initialize"),
    "float16 autocast": (engine(torch_autocast_gradscaler=object()), "set torch_autocast.dtype to bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    made, message = CASES[case]
    with pytest.raises(ConfigError) as caught:
        check_engine(made)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_experts_are_refused() -> None:
    made = engine()
    made.has_moe_layers = True
    with pytest.raises(ConfigError, match="without deepspeed.moe layers"):
        check_engine(made)


@pytest.mark.parametrize(
    ("kind", "stage"), [("DeepSpeedZeroOptimizer", 1), ("DeepSpeedZeroOptimizer", 2), ("BF16_Optimizer", 1)]
)
def test_accepted(kind: str, stage: int) -> None:
    check_engine(engine(kind, stage=stage))


def test_the_names_are_deepspeeds() -> None:
    """What is told by a class's name exists under that name."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
    from deepspeed.runtime.utils import DummyOptim
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = [FP16_Optimizer, FP16_UnfusedOptimizer, SuperOffloadOptimizer_Stage3, DeepSpeedZeRoOffload]
    assert {kind.__name__ for kind in kinds} | {"MiCS_Optimizer"} == set(_OTHER_OPTIMIZERS)
    # MiCS and the 1-bit optimizers are in older versions only.
    assert [kind.__name__ for kind in (DummyOptim, PipelineEngine)] == ["DummyOptim", "PipelineEngine"]
    assert BF16_Optimizer.__name__ == "BF16_Optimizer"
    # What the backends wrap or call, beside the lists that test_backends compares.
    for method in ("_update_scale", "unscale_and_clip_grads", "_optimizer_step"):
        assert hasattr(DeepSpeedZeroOptimizer, method) and hasattr(DeepSpeedZeroOptimizer_Stage3, method)
    assert hasattr(BF16_Optimizer, "clear_hp_grads")
