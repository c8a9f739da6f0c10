"""Settings of a supervised fine-tuning run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel
from megatron_klong.config.data import DataConfig
from megatron_klong.config.parallel import ParallelConfig
from megatron_klong.config.presets import preset_file


class RunConfig(StrictModel):
    """Where a run lives."""

    dir: Path
    """The run directory: resolved config, metrics, checkpoints. One run per directory."""

    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seeds the fresh weights, the order of the data, and the random numbers of every step."""

    check_memory: bool = True
    """Refuse to start where the planner says that the layout does not fit the memory of the devices."""


class RouterConfig(StrictModel):
    """How the routers of expert layers are trained, where the model has any."""

    balancing: Literal["none", "aux_loss", "global_aux_loss"] = "none"
    """Auxiliary loss that spreads tokens over experts: over each row, or over the rows of all data-parallel
    ranks (with a running mean over the micro-batches of a step). By its nature it depends on how samples
    are packed."""

    balancing_coefficient: float = Field(default=0.0, ge=0)
    """Weight of that loss against the mean loss of a trained token."""

    bias_update_rate: float = Field(default=0.0, ge=0)
    """Step by which the bias for choosing experts moves after every optimizer step, towards those with fewer
    tokens (models with such a bias). 0 leaves it as it is."""

    replay: bool = False
    """Build routers that can be told which experts to choose."""

    @model_validator(mode="after")
    def _coefficient_fits(self) -> RouterConfig:
        if (self.balancing == "none") != (self.balancing_coefficient == 0):
            raise ValueError(
                f"router.balancing={self.balancing} with router.balancing_coefficient="
                f"{self.balancing_coefficient}: name both, or neither"
            )
        return self


RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
Recompute = Literal["none", "full"] | tuple[RecomputedModule, ...]


class ModelConfig(StrictModel):
    """Which model is trained."""

    hf_config: Path | None = None
    """Hugging Face `config.json` (or its folder) of a GLM-4.5-MoE, Qwen3-MoE or Qwen3 model."""

    preset: str | None = None
    """Name of a shape that comes with this package, in place of `hf_config` (`klong model list`)."""

    weights: Path | None = None
    """Hugging Face folder with safetensors, or Megatron checkpoint, to start from. Default: fresh
    weights from the seed."""

    recompute: Recompute = "none"
    """Activations that are computed again in the backward pass instead of kept: none; those of whole layers;
    or those of the modules listed (Megatron's names). The result is the same."""

    recompute_layers: int | None = Field(default=None, gt=0)
    """With `recompute: full`, how many layers of each pipeline stage. Default: all."""

    deterministic: bool = False
    """Choose kernels that give the same bits each time, at some cost in speed (a CPU always has them)."""

    loss_chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens whose logits exist at a time: of this many, not of the whole row, over the vocabulary."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Data type of weights and activations. Gradients and optimizer state are fp32 either way."""

    prediction: Literal["train", "leave"] = "leave"
    """Multi-token prediction layers, where the model has any: trained along, or held and saved unchanged."""

    prediction_loss_weight: float = Field(default=0.1, gt=0)
    """Weight of their loss (a mean over the layers) against that of the next token."""

    router: RouterConfig = RouterConfig()
    """How its routers are trained."""

    @model_validator(mode="after")
    def _one_shape(self) -> ModelConfig:
        if (self.preset is None) == (self.hf_config is None):
            raise ValueError("name either model.hf_config or model.preset")
        if self.preset is not None:
            preset_file(self.preset)
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> ModelConfig:
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(
                f"model.recompute_layers={self.recompute_layers} needs model.recompute=full, not "
                f"{self.recompute!r}"
            )
        counts_tokens = self.router.balancing != "none" or self.router.bias_update_rate > 0
        if self.recompute_layers is not None and (self.prediction == "train" or counts_tokens):
            # Megatron has no such mode for prediction layers, and counts padding in layers that it skips.
            raise ValueError(
                f"model.recompute_layers={self.recompute_layers}: with trained prediction layers or balanced "
                "routers all layers are recomputed, or none; leave it out"
            )
        return self

    @property
    def shape(self) -> Path:
        """The `config.json` (or its folder) that says what the model is."""
        if self.preset is not None:
            return preset_file(self.preset)
        assert self.hf_config is not None
        return self.hf_config


class OptimizerConfig(StrictModel):
    """AdamW with Megatron's distributed optimizer."""

    lr: float = Field(gt=0)
    """Peak learning rate."""

    min_lr: float = Field(default=0.0, ge=0)
    """Where the decay ends."""

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape of the decay after the warm-up; `wsd` (warm-up, stable, decay) keeps the peak rate until the last
    `decay_steps`."""

    decay_steps: int | None = Field(default=None, gt=0)
    """With `schedule: wsd`, the steps of its decay at the end. Default: a tenth of the run."""

    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """With `schedule: wsd`, the shape of that decay."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; not on biases and norms."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first moment decay."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second moment decay."""

    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""

    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""

    offload: bool = False
    """Keep Adam's moments in host memory, 8 bytes of the 12 for each parameter that a rank owns; every step
    sends them to the device and back, piece by piece. Weights and checkpoints are the same."""

    @model_validator(mode="after")
    def _rates_fit(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr} must not exceed optimizer.lr={self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_steps={self.decay_steps} is of schedule=wsd, not {self.schedule}"
            )
        return self

    def check_steps(self, steps: int) -> None:
        """Refuse a warm-up or a decay that does not fit in a run of so many steps (ValueError)."""
        if self.warmup_steps >= steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} must be below the run's {steps} optimizer steps"
            )
        if self.schedule == "wsd" and self.warmup_steps + self.last_steps(steps) > steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} and decay_steps={self.last_steps(steps)} exceed "
                f"the run's {steps} optimizer steps"
            )

    def last_steps(self, steps: int) -> int:
        """Steps of the decay of `wsd` in a run of so many steps."""
        return self.decay_steps or max(1, steps // 10)


class TrainerSettings(StrictModel):
    """What a trainer is built from, whatever it trains on."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig

    row_tokens: int
    """Tokens of every row, which is one micro-batch."""

    steps: int
    """Optimizer steps of the whole run."""

    seed: int
    """Of fresh weights."""

    def check(self, row_field: str, window_tokens: int) -> None:
        """Refuse settings that do not agree.

        Args:
            row_field: the config's name of the row length, for errors.
            window_tokens: of the longest window.

        Raises:
            ValueError: names the fields and the remedy.
        """
        if self.row_tokens < window_tokens:
            raise ValueError(
                f"{row_field}={self.row_tokens} is less than the window's max_tokens={window_tokens}; "
                "a window must fit in a row"
            )
        if self.row_tokens % self.parallel.row_divisor:
            raise ValueError(
                f"{row_field}={self.row_tokens} is no multiple of {self.parallel.row_divisor}, which "
                f"parallel.tensor={self.parallel.tensor} and parallel.context={self.parallel.context} need"
            )
        self.optimizer.check_steps(self.steps)


class AnomalyConfig(StrictModel):
    """What is done about a step that went wrong. Each is reported with the trajectories of its batch."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not a number: `stop`, or `skip` the batch without an update."""

    spike: Literal["report", "skip", "stop"] = "report"
    """A loss far above those before it: only `report` it, `skip` the batch, or `stop`."""

    spike_deviations: float = Field(default=10.0, gt=0)
    """How far: above the median of the last `spike_steps` losses of the phase, in standard deviations (1.4826
    times their median absolute deviation, but at least 2% of the median)."""

    spike_steps: int = Field(default=64, ge=2)
    """Losses that a loss is compared with; the first half as many of a phase are not judged."""

    most_skipped: int = Field(default=5, gt=0)
    """So many batches skipped in a row stop the run."""


class TrainingConfig(StrictModel):
    """How much at a time, and what is written."""

    global_batch_rows: int = Field(gt=0)
    """Packed rows per step over all data-parallel ranks."""

    eval_every: int = Field(default=100, ge=0)
    """Steps between evaluations on the held-out trajectories of every source (also before the first and after
    the last step); 0 never evaluates."""

    eval_rows: int = Field(default=64, gt=0)
    """Held-out rows of each source per evaluation, at most; always the same ones."""

    save_every: int = Field(default=500, ge=0)
    """Steps between checkpoints, beside the one at the end; 0 saves at the end only."""

    save_in_background: bool = True
    """Write checkpoints while training goes on, from a copy in the host's memory."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted after a new one is complete."""

    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are a multiple of it are kept for good; 0 keeps none beside the last."""

    anomalies: AnomalyConfig = AnomalyConfig()
    """What is done about losses that are no numbers, or spikes."""

    hang_seconds: float = Field(default=1800.0, gt=0)
    """When a rank makes no progress for so long, the one that all wait for is named and the run stopped."""

    stop_seconds: float = Field(default=600.0, gt=0)
    """After SIGTERM, SIGINT or SIGHUP the ranks have so long to end their step and save."""


class WandbConfig(StrictModel):
    """Weights & Biases."""

    project: str = "megatron_klong"
    """Project of the runs."""

    entity: str | None = None
    """User or team. Default: that of the API key."""

    name: str | None = None
    """Of this run. Default: chosen by W&B."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run directory, for `wandb sync`; so does `online` where W&B cannot be
    reached."""

    timeout_seconds: float = Field(default=30.0, gt=0)
    """How long the run waits for W&B, at its start and at its end."""


class LogConfig(StrictModel):
    """Where a run says what it does, beside `metrics.jsonl`, which has every step."""

    every: int = Field(default=10, gt=0)
    """Steps between progress lines."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Of one device at the model's precision, for model FLOPs utilization (MFU). Default: known for common
    GPUs; without it the achieved TFLOP/s are shown."""

    tensorboard: bool = False
    """Write TensorBoard's event files into the run directory."""

    wandb: WandbConfig | None = None
    """Log to Weights & Biases; `log.wandb={}` takes all defaults."""


class SftConfig(StrictModel):
    """A whole supervised fine-tuning run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    log: LogConfig = LogConfig()

    def trainer_settings(self, steps: int) -> TrainerSettings:
        """What the trainer of a run of so many steps is built from.

        Raises:
            ValueError: settings do not agree.
        """
        settings = TrainerSettings(
            model=self.model, parallel=self.parallel, optimizer=self.optimizer,
            row_tokens=self.data.row_length, steps=steps, seed=self.run.seed,
        )  # fmt: skip
        settings.check("data.row_tokens", self.data.window.max_tokens)
        return settings

    @model_validator(mode="after")
    def _fields_agree(self) -> SftConfig:
        self.check_world(self.parallel.world_size)
        # A phase that ends with its data has as many steps as that makes, which is checked when it is known.
        self.trainer_settings(self.data.fixed_steps or sys.maxsize)
        return self

    def check_world(self, world_size: int) -> None:
        """Refuse a number of ranks that layout or batch do not divide (ValueError)."""
        self.parallel.check(world_size)
        ways, rows = self.parallel.data(world_size), self.training.global_batch_rows
        multiple = ways * self.parallel.micro_batch_divisor
        if rows % multiple:
            stages = ""
            if multiple > ways:
                stages = f" times parallel.pipeline={self.parallel.pipeline}, as interleaved stages need"
            raise ValueError(
                f"training.global_batch_rows={rows} is no multiple of the {ways} data-parallel "
                f"ranks{stages}; use {(rows // multiple + 1) * multiple}"
            )
