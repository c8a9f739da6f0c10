"""Settings of a reinforcement learning run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel
from megatron_klong.config.parallel import ParallelConfig
from megatron_klong.config.sandbox import SandboxConfig
from megatron_klong.config.server import ServerConfig
from megatron_klong.config.sft import ModelConfig, OptimizerConfig, RunConfig, TrainerSettings
from megatron_klong.config.window import WindowConfig


class StageConfig(StrictModel):
    """A stretch of iterations with one time limit."""

    limit: float = Field(gt=0)
    """Budget of a rollout, in units of `rollout.clock`: seconds or tokens."""

    iterations: int = Field(gt=0)
    """Batches of groups that are rolled out and trained on."""


class TasksConfig(StrictModel):
    """What is rolled out."""

    train: Path
    """Folder of task folders; each iteration draws from them."""

    held_out: Path | None = None
    """Folder of task folders that are never trained on: graded before the first stage, and after each."""


class RolloutConfig(StrictModel):
    """How rollouts are made."""

    groups: int = Field(default=8, gt=0)
    """Tasks of an iteration; each has a group of rollouts."""

    group_size: int = Field(default=8, ge=2)
    """n: rollouts of a group; their mean grade is the baseline."""

    concurrent: int = Field(default=32, gt=0)
    """Rollouts that are played at one time, each in a sandbox."""

    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; the trainer divides logits by the same."""

    clock: Literal["wall", "token"] = "wall"
    """What limits are counted in: `wall`, seconds of generation and tools, or `token`, generated tokens and
    a price for each tool call, which is the same on every machine."""

    tokens_per_call: float = Field(default=0.0, ge=0)
    """Price of a tool call on the token clock."""

    tool_seconds: float = Field(default=60.0, gt=0)
    """Longest run of one tool call."""

    shuffle_grades: bool = False
    """Control experiment: hand the grades of each group to its rollouts in a random order."""


class ObjectiveConfig(StrictModel):
    """What is minimised (design, RL objective)."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """e_low: the ratio of new to old probability is clipped below 1 - e_low."""

    clip_high: float = Field(default=0.28, gt=0)
    """e_high: and above 1 + e_high. Larger than e_low, so that rare tokens can rise."""

    importance_cap: float = Field(default=2.0, ge=1)
    """C: most weight of a token by trainer's over engine's probability."""

    kl: float = Field(default=0.0, ge=0)
    """beta: weight of the divergence from the model that the run started with; 0 keeps no such model."""

    divide_by_std: bool = False
    """Divide a group's advantages by the standard deviation of its grades."""

    normalise: Literal["window", "token", "rollout"] = "window"
    """What the objective is a mean over: windows (each the mean over its tokens), tokens, or rollouts (each
    the mean over its tokens)."""

    updates: int = Field(default=1, ge=1)
    """Optimizer steps on a batch, each on a part of its rows. With one, the ratio is 1 and clipping idle."""


class EvaluationConfig(StrictModel):
    """How held-out tasks are graded."""

    rollouts: int = Field(default=1, gt=0)
    """Rollouts of each task."""

    limit: float | None = Field(default=None, gt=0)
    """Budget of a rollout; default that of the last stage."""


class RlTrainerConfig(StrictModel):
    """The trainer's side of a run."""

    row_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a packed row, which is one micro-batch. Default: the window's max_tokens."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept. There is one after every iteration, before its weights are served."""

    sync_tolerance: float | None = Field(default=None, gt=0)
    """How far a log-prob of a server may be from the trainer's after a sync. Default: 1e-4 with
    `model.precision: fp32`, 0.15 with bf16, whose rounding differs between implementations."""

    sync_seconds: float = Field(default=3600.0, gt=0)
    """So long syncs are tried again, where servers do not answer or refuse; then the trainer ends the run."""

    chunk_bytes: int = Field(default=64 << 20, gt=0)
    """Shared memory of a chunk, for `transfer: shm`."""


class RlConfig(StrictModel):
    """A whole reinforcement learning run."""

    run: RunConfig
    model: ModelConfig
    tokenizer: Path
    """Folder with the model's tokenizer.json."""

    renderer: str = "glm-4.5"
    """Chat format, as in `klong data tokenize`."""

    window: WindowConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    trainer: RlTrainerConfig = RlTrainerConfig()
    server: ServerConfig
    """Its `model` is the Hugging Face folder that servers start from; a sync follows before anything is
    generated."""

    servers: int = Field(default=1, gt=0)
    """vLLM servers; rollouts are spread over them."""

    sandbox: SandboxConfig = SandboxConfig()
    tasks: TasksConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In order; limits usually grow."""

    evaluation: EvaluationConfig = EvaluationConfig()
    max_restarts: int = Field(default=5, ge=0)
    """How often `klong rl CONFIG` starts each of its processes again."""

    @property
    def iterations(self) -> int:
        """Of all stages."""
        return sum(stage.iterations for stage in self.stages)

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, resolved."""
        return self.trainer.row_tokens or self.window.max_tokens

    @property
    def sync_tolerance(self) -> float:
        """The tolerance of probes, resolved."""
        default = 1e-4 if self.model.precision == "fp32" else 0.15
        return self.trainer.sync_tolerance or default

    @property
    def trainer_settings(self) -> TrainerSettings:
        """What the trainer is built from."""
        return TrainerSettings(
            model=self.model, parallel=self.parallel, optimizer=self.optimizer, row_tokens=self.row_length,
            steps=self.iterations * self.objective.updates, seed=self.run.seed,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fields_agree(self) -> RlConfig:
        self.trainer_settings.check("trainer.row_tokens", self.window.max_tokens)
        if self.model.weights is None:
            raise ValueError("model.weights is missing: reinforcement learning starts from a trained model")
        if self.server.max_model_len < self.window.max_tokens:
            raise ValueError(
                f"server.max_model_len={self.server.max_model_len} is less than "
                f"window.max_tokens={self.window.max_tokens}: the longest contexts would be refused"
            )
        if self.model.prediction == "train" or self.model.router.bias_update_rate:
            raise ValueError(
                f"model.prediction={self.model.prediction} with model.router.bias_update_rate="
                f"{self.model.router.bias_update_rate}: reinforcement learning trains neither prediction "
                "layers nor the routers' bias; use leave and 0"
            )
        if self.window.prefix == "marked":
            raise ValueError("window.prefix=marked: live tasks carry no mark; use task or reading")
        if self.objective.normalise == "rollout" and self.objective.updates > 1:
            raise ValueError(
                f"objective.normalise=rollout does not go with objective.updates={self.objective.updates}: "
                "the windows of a rollout fall into different updates; use normalise=window or token, or 1 "
                "update"
            )
        if self.servers > 1 and self.server.port:
            raise ValueError(f"server.port={self.server.port} cannot serve {self.servers} servers; use 0")
        if (self.server.dtype == "float32") != (self.model.precision == "fp32"):
            raise ValueError(
                f"server.dtype={self.server.dtype} does not match model.precision={self.model.precision}"
            )
        return self
