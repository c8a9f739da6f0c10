"""Model, optimizer and schedule of a rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_klong.config import OptimizerConfig, TrainerSettings
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.gpt import build_model
from megatron_klong.model.hf_config import config_json
from megatron_klong.model.row_model import RankModel
from megatron_klong.model.weights import check_known, load_weights, random_weights, safetensors_weights
from megatron_klong.platform import Platform
from megatron_klong.training.model_checkpoint import is_checkpoint, load_model
from megatron_klong.training.moments import keep_moments_on_host


@dataclass
class Trainer:
    """Everything that a step changes.

    Attributes:
        model: this rank's pipeline stages.
        stages: each of them under Megatron's data parallelism.
        optimizer: Megatron's distributed optimizer.
        scheduler: learning rate and weight decay by step.
        device: where batches go.
        row_tokens: length of every row.
        row_multiple: what the rows of a data-parallel rank must be a multiple of.
        config_json: the model's `config.json`, as it was at the start; it goes into every checkpoint.
        on_row: called before every micro-batch.
    """

    model: RankModel
    stages: tuple[DistributedDataParallel, ...]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    device: torch.device
    row_tokens: int
    row_multiple: int
    config_json: bytes
    on_row: Callable[[], None] = lambda: None

    def zero_gradients(self) -> None:
        """Of all parameters, and what the optimizer has made of them."""
        for stage in self.stages:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()


def build_trainer(
    settings: TrainerSettings,
    hf: DecoderConfig,
    platform: Platform,
    *,
    resumes: bool = False,
    on_tensor: Callable[[], None] = lambda: None,
) -> Trainer:
    """Build the model with its first weights, and the optimizer over them.

    Args:
        resumes: all weights will be read from a checkpoint: none are set here.
        on_tensor: called for each tensor that is set one by one (not of a Megatron checkpoint).
    """
    if settings.model.deterministic:
        _choose_deterministic_kernels()
    model = build_model(hf, settings.parallel, settings.model, settings.row_tokens).to(platform.device)
    if not resumes:
        _set_first_weights(model, settings, hf, on_tensor)
    data_parallel = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    stages = [DistributedDataParallel(model.config, data_parallel, stage) for stage in model]
    optimizer = get_megatron_optimizer(
        _optimizer_config(settings.optimizer, model.config.params_dtype), stages
    )
    if settings.optimizer.offload:
        keep_moments_on_host(optimizer)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    scheduler = _scheduler(settings.optimizer, settings.steps, optimizer)
    config_file = config_json(settings.model.shape).read_bytes()
    return Trainer(
        model, tuple(stages), optimizer, scheduler, platform.device,
        settings.row_tokens, settings.parallel.micro_batch_divisor, config_file,
    )  # fmt: skip


def _choose_deterministic_kernels() -> None:
    """Before anything is computed: cuBLAS, NCCL and Transformer Engine read their environment once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def _set_first_weights(
    model: RankModel, settings: TrainerSettings, hf: DecoderConfig, on_tensor: Callable[[], None]
) -> None:
    """The weights that a run starts from: fresh, of a Hugging Face folder, or of a checkpoint."""
    weights = settings.model.weights
    if weights is None:
        load_weights(model, hf, random_weights(hf, settings.seed), on_tensor)
    elif is_checkpoint(weights):
        load_model(model, weights)
    else:
        check_known(weights, hf)
        load_weights(model, hf, safetensors_weights(weights), on_tensor)


def _optimizer_config(config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )


def _scheduler(config: OptimizerConfig, steps: int, optimizer: Any) -> OptimizerParamScheduler:
    is_wsd = config.schedule == "wsd"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if is_wsd else config.schedule,
        wsd_decay_steps=config.last_steps(steps) if is_wsd else None,
        lr_wsd_decay_style=config.decay_shape if is_wsd else None,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
