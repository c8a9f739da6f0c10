"""Settings: pydantic models, YAML, ``key=value`` overrides. Imports neither torch nor vllm."""

from megatron_klong.config.base import StrictModel
from megatron_klong.config.data import DataConfig, MixConfig, PhaseConfig, SourceConfig
from megatron_klong.config.launch import (
    DockerLaunchConfig,
    LaunchConfig,
    NodesConfig,
    RolesConfig,
    SlurmLaunchConfig,
    StepConfig,
)
from megatron_klong.config.load import (
    config_keys,
    dump_config,
    load_config,
    validate_config,
)
from megatron_klong.config.parallel import ParallelConfig
from megatron_klong.config.presets import preset_file, preset_names
from megatron_klong.config.rl import (
    EvaluationConfig,
    ObjectiveConfig,
    RlConfig,
    RolloutConfig,
    StageConfig,
    TasksConfig,
)
from megatron_klong.config.sandbox import SandboxConfig
from megatron_klong.config.server import ServerConfig, TransferBackend
from megatron_klong.config.sft import (
    AnomalyConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    Recompute,
    RouterConfig,
    RunConfig,
    SftConfig,
    TrainerSettings,
    TrainingConfig,
    WandbConfig,
)
from megatron_klong.config.window import PrefixRule, UntrainablePolicy, WindowConfig

__all__ = [
    "AnomalyConfig",
    "DataConfig",
    "DockerLaunchConfig",
    "EvaluationConfig",
    "LaunchConfig",
    "LogConfig",
    "MixConfig",
    "ModelConfig",
    "NodesConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PrefixRule",
    "Recompute",
    "RlConfig",
    "RolesConfig",
    "RolloutConfig",
    "RouterConfig",
    "RunConfig",
    "SandboxConfig",
    "ServerConfig",
    "SftConfig",
    "SlurmLaunchConfig",
    "SourceConfig",
    "StageConfig",
    "StepConfig",
    "StrictModel",
    "TasksConfig",
    "TrainerSettings",
    "TrainingConfig",
    "TransferBackend",
    "UntrainablePolicy",
    "WandbConfig",
    "WindowConfig",
    "config_keys",
    "dump_config",
    "load_config",
    "preset_file",
    "preset_names",
    "validate_config",
]
