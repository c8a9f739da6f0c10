"""Model, optimizer and schedule of a rank."""

from __future__ import annotations

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

from megatron_klong.config import ModelConfig, OptimizerConfig, SftConfig
from megatron_klong.model.glm4_moe import build_model
from megatron_klong.model.hf_config import Glm4MoeConfig
from megatron_klong.model.weights import (
    WeightSource,
    load_weights,
    random_weights,
    safetensors_weights,
)
from megatron_klong.platform import Platform


@dataclass
class Trainer:
    """Everything that a step changes.

    Attributes:
        model: this rank's stage under Megatron's data parallelism.
        optimizer: Megatron's distributed optimizer.
        scheduler: learning rate and weight decay by step.
        device: where batches go.
        row_tokens: length of every row.
    """

    model: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler
    device: torch.device
    row_tokens: int


def build_trainer(config: SftConfig, hf: Glm4MoeConfig, platform: Platform) -> Trainer:
    """Build the model with its first weights, and the optimizer over them."""
    dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
    row_tokens = config.data.row_length
    model = build_model(hf, config.parallel, dtype, row_tokens).to(platform.device)
    load_weights(model, hf, initial_weights(config.model, hf, config.run.seed))
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        model,
    )
    optimizer = get_megatron_optimizer(_optimizer_config(config.optimizer, dtype), [wrapped])
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    scheduler = _scheduler(config.optimizer, config.training.steps, optimizer)
    return Trainer(wrapped, optimizer, scheduler, platform.device, row_tokens)


def initial_weights(config: ModelConfig, hf: Glm4MoeConfig, seed: int) -> WeightSource:
    """The weights that a run starts from."""
    return random_weights(hf, seed) if config.weights is None else safetensors_weights(config.weights)


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
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
