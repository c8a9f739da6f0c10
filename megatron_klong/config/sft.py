"""Settings of a supervised fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel
from megatron_klong.config.parallel import ParallelConfig
from megatron_klong.config.presets import preset_file
from megatron_klong.config.window import WindowConfig


class RunConfig(StrictModel):
    """Where a run lives."""

    dir: Path
    """The run directory: resolved config, metrics, checkpoints. One run per directory."""

    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seeds the fresh weights and the order of the data."""


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


class ModelConfig(StrictModel):
    """Which model is trained."""

    hf_config: Path | None = None
    """Hugging Face `config.json` (or its folder) of a GLM-4.5-MoE, Qwen3-MoE or Qwen3 model."""

    preset: str | None = None
    """Name of a shape that comes with this package, in place of `hf_config` (`klong model list`)."""

    weights: Path | None = None
    """Hugging Face folder with safetensors, or Megatron checkpoint, to start from. Default: fresh
    weights from the seed."""

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

    @property
    def shape(self) -> Path:
        """The `config.json` (or its folder) that says what the model is."""
        if self.preset is not None:
            return preset_file(self.preset)
        assert self.hf_config is not None
        return self.hf_config


class BlendConfig(StrictModel):
    """Another source of data."""

    store: Path
    """PREFIX of its token store, of the same tokenizer; general chat data are trajectories too."""

    weight: float = Field(gt=0)
    """Windows of it for each window of `data.store`. Those of a small store come more than once an epoch."""


class DataConfig(StrictModel):
    """What is trained on."""

    store: Path
    """PREFIX of a token store, as written by `klong data tokenize`. An epoch has each of its windows once."""

    blend: tuple[BlendConfig, ...] = ()
    """More stores, mixed in."""

    window: WindowConfig
    """How its trajectories are split."""

    row_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a packed row, which is one micro-batch. Default: the window's max_tokens."""

    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the trajectories that is held out, the last ones of the store. 0 holds out none."""

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, resolved."""
        return self.row_tokens or self.window.max_tokens

    @property
    def stores(self) -> tuple[Path, ...]:
        """All stores."""
        return (self.store, *(source.store for source in self.blend))


class OptimizerConfig(StrictModel):
    """AdamW with Megatron's distributed optimizer."""

    lr: float = Field(gt=0)
    """Peak learning rate."""

    min_lr: float = Field(default=0.0, ge=0)
    """Where the decay ends."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""

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
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr={self.optimizer.min_lr} must not exceed optimizer.lr={self.optimizer.lr}"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below the run's "
                f"{self.steps} optimizer steps"
            )


class TrainingConfig(StrictModel):
    """How long, how much at a time, and what is written."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""

    global_batch_rows: int = Field(gt=0)
    """Packed rows per step over all data-parallel ranks."""

    eval_every: int = Field(default=100, ge=0)
    """Steps between evaluations on the held-out trajectories (also before the first and after the
    last step); 0 never evaluates."""

    eval_rows: int = Field(default=64, gt=0)
    """Held-out rows per evaluation, at most; always the same ones."""

    save_every: int = Field(default=500, ge=0)
    """Steps between checkpoints, beside the one at the end; 0 saves at the end only."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted after a new one is complete."""

    log_every: int = Field(default=10, gt=0)
    """Steps between progress lines; `metrics.jsonl` has every step."""


class SftConfig(StrictModel):
    """A whole supervised fine-tuning run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig

    @property
    def trainer_settings(self) -> TrainerSettings:
        """What the trainer is built from."""
        return TrainerSettings(
            model=self.model, parallel=self.parallel, optimizer=self.optimizer,
            row_tokens=self.data.row_length, steps=self.training.steps, seed=self.run.seed,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fields_agree(self) -> SftConfig:
        self.check_world(self.parallel.world_size)
        self.trainer_settings.check("data.row_tokens", self.data.window.max_tokens)
        return self

    def check_world(self, world_size: int) -> None:
        """Refuse a number of ranks that layout or batch do not divide (ValueError)."""
        self.parallel.check(world_size)
        ways, rows = self.parallel.data(world_size), self.training.global_batch_rows
        if rows % ways:
            raise ValueError(
                f"training.global_batch_rows={rows} is no multiple of the {ways} data-parallel "
                f"ranks; use {(rows // ways + 1) * ways}"
            )
