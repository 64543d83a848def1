"""The whole schema of a run, a file a section. Every key has a description: the README's reference is generated from here."""

from __future__ import annotations

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from digrap_scale.config.checks import CROSS_FIELD, cross_field_problems

from .base import Section, check_regex
from .data import DataConfig, HoldOutConfig
from .evaluation import EvaluationConfig, GenerationConfig, ShiftDegreeConfig, SuiteEntry
from .logging import LoggingConfig, MlflowConfig, ProfilerConfig, WandbConfig
from .method import (
    REFERENCE_WORDS,
    DiGraPMethod,
    DiGraPUpdateMethod,
    FTPMethod,
    L2SPMethod,
    LinearProbeMethod,
    LPFTMethod,
    MethodConfig,
    NoMethod,
    PCGradMethod,
    ReferenceConfig,
    SPDMethod,
)
from .model import LoraConfig, ModelConfig
from .optimizer import OptimizerConfig, ParameterGroupConfig, ScheduleConfig
from .run import RunConfig
from .sharding import ShardingConfig, ZeroConfig
from .training import CheckpointConfig, TrainingConfig

__all__ = [
    "REFERENCE_WORDS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiGraPMethod",
    "DiGraPUpdateMethod",
    "EvaluationConfig",
    "GenerationConfig",
    "HoldOutConfig",
    "FTPMethod",
    "L2SPMethod",
    "LPFTMethod",
    "LinearProbeMethod",
    "LoggingConfig",
    "LoraConfig",
    "MethodConfig",
    "MlflowConfig",
    "ModelConfig",
    "NoMethod",
    "OptimizerConfig",
    "PCGradMethod",
    "ParameterGroupConfig",
    "ProfilerConfig",
    "ReferenceConfig",
    "RunConfig",
    "SPDMethod",
    "ScheduleConfig",
    "Section",
    "ShardingConfig",
    "ShiftDegreeConfig",
    "SuiteEntry",
    "TrainingConfig",
    "WandbConfig",
    "ZeroConfig",
    "check_regex",
]


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    sharding: ShardingConfig = ShardingConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        problems = cross_field_problems(self.model_dump())
        if problems:
            lines = "; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in problems)
            raise PydanticCustomError(CROSS_FIELD, "{problems}", {"problems": lines})
        return self
