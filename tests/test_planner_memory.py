"""What the planner says of memory, against what ranks allocate."""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_klong.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainerSettings
from megatron_klong.data.rows import PackedRow, fill_row
from megatron_klong.data.windows import TrainingSample
from megatron_klong.model import attention
from megatron_klong.model.experts import GroupedExperts
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.parameters import rank_parameters
from megatron_klong.planner.activations import rank_tokens
from megatron_klong.planner.memory import NO_OVERHEADS, MemoryModel
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import train_step
from megatron_klong.training.trainer import Trainer, build_trainer
from tests.ranks import RankPool

ROW_TOKENS = 1024
ROWS = 4
GLM = {
    "model_type": "glm4_moe", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "attention_bias": True, "moe_intermediate_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
DENSE = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 640,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def at(world: int, **layout: int) -> tuple[int, ParallelConfig]:
    return world, ParallelConfig(**layout)


ALL = ("core_attn", "layernorm", "mlp", "moe")
CASES: list[tuple[dict[str, Any], tuple[int, ParallelConfig], dict[str, Any]]] = [
    (GLM, at(1), {"prediction": "train"}),
    (GLM, at(1), {"recompute": "full", "recompute_layers": 2}),
    (GLM, at(1), {"recompute": ALL}),
    (GLM | {"moe_intermediate_size": 512}, at(1), {"precision": "fp32"}),
    (GLM, at(2, context=2, expert=2), {}),
    (GLM, at(3, pipeline=3), {"recompute": ("shared_experts",)}),
    (GLM, at(2, pipeline=2, virtual=2), {}),
    (GLM, at(4, tensor=2, pipeline=2, virtual=2, expert=2), {"recompute": ("moe",)}),
    (GLM, at(4, tensor=2, pipeline=2, expert=2), {}),
    (GLM, at(4, context=2, pipeline=2, expert=2), {"recompute": ("moe",)}),
    (QWEN, at(4, tensor=2, pipeline=2, expert=2), {"recompute": "full"}),
    (GLM, at(2, expert=2), {"offload": True}),
    (DENSE, at(2, pipeline=2), {}),
    (DENSE | {"tie_word_embeddings": True}, at(2, tensor=2), {"recompute": ("mlp",)}),
]  # fmt: skip


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                     "fordblks", "keepcost")
    ]  # fmt: skip


def allocated() -> int:
    """Bytes that this process has from the C library."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo2
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class Sampled(TorchDispatchMode):
    """Looks at the allocator after every operation of torch, those of backward passes too.

    After a collective operation it gives gloo's threads the time to let go of its tensors.
    """

    peak = 0
    was_collective = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.was_collective:
            time.sleep(0.003)
        self.was_collective = "c10d" in func.namespace
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, allocated())
        return result


@contextmanager
def attention_under_sampling() -> Iterator[None]:
    """torch cannot make the mask of a document's later part, a subclass of Tensor, in a dispatch mode."""
    make = attention.causal_lower_right

    def outside(*sizes: int) -> Tensor:
        with _disable_current_modes():
            return make(*sizes)

    attention.causal_lower_right = outside
    try:
        yield
    finally:
        attention.causal_lower_right = make


def full_row(vocabulary: int) -> PackedRow:
    """Three documents that fill a row, every token of them trained."""
    random = np.random.default_rng(1)
    lengths = (ROW_TOKENS // 2, ROW_TOKENS // 4, ROW_TOKENS // 4)
    samples = [
        TrainingSample(random.integers(0, vocabulary, n), np.ones(n, dtype=bool), trajectory=i, window=0)
        for i, n in enumerate(lengths)
    ]
    return fill_row(samples, ROW_TOKENS)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all their memory, each piece once."""
    found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(found.values())


def standing(trainer: Trainer) -> dict[str, int]:
    """Bytes that are there between steps."""
    module = trainer.model
    weights = [*module.parameters(), *(each for each in module.buffers() if each is not None)]
    owned = {each.untyped_storage().data_ptr() for each in weights}
    inner = [each.optimizer for each in trainer.optimizer.chained_optimizers]
    state = [part for each in inner for parts in each.state.values() for part in parts.values()]
    held = [weight for each in inner for group in each.param_groups for weight in group["params"]]
    own = [
        each for each in (*state, *held)
        if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in owned
    ]  # fmt: skip
    buffers = [each for stage in trainer.stages for each in (*stage.buffers, *stage.expert_parallel_buffers)]
    return {
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(buffer.grad_data for buffer in buffers),
        "optimizer": storage_bytes(own),
    }


def measured(
    platform: Platform, folder: Path, parallel: ParallelConfig, model: dict[str, Any], offload: bool
) -> tuple[int, int, float, dict[str, int]]:
    """Place in the pipeline, parameters, tokens of the experts over the average, and bytes by kind."""
    hf = load_hf_config(folder)
    settings = TrainerSettings(
        model=ModelConfig.model_validate({"hf_config": folder, **model}), parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3, offload=offload), row_tokens=ROW_TOKENS, steps=10, seed=1,
    )  # fmt: skip
    trainer = build_trainer(settings, hf, platform)
    rows = [full_row(hf.vocab_size)] * ROWS
    train_step(trainer, rows, sft_objective)  # the optimizer makes its state in the first step
    routed: list[int] = []
    for module in trainer.model.modules():
        if isinstance(module, GroupedExperts):
            module.register_forward_pre_hook(lambda _, given: routed.append(given[0].size(0)))
    gc.collect()
    before = allocated()
    with attention_under_sampling(), Sampled() as sampled:
        train_step(trainer, rows, sft_objective)
    average = rank_tokens(hf, parallel, ROW_TOKENS, 1.0).routed
    imbalance = sum(routed) / len(routed) / average if routed else 1.0
    counts = sum(weight.numel() for weight in trainer.model.parameters())
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return stage, counts, imbalance, {**standing(trainer), "step": sampled.peak - before}


@pytest.mark.parametrize(
    ("shape", "layout", "options"), CASES,
    ids=lambda value: value["model_type"] if isinstance(value, dict) and "model_type" in value
    else "-".join(map(str, value.values())) or "plain" if isinstance(value, dict)
    else value[1].described(value[0]).replace(" ", ""),
)  # fmt: skip
def test_memory_is_what_ranks_allocate(
    ranks: RankPool, tmp_path: Path, shape: dict[str, Any], layout: tuple[int, ParallelConfig],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """On every rank: what stands between steps within 1%, all that there is at the peak within 5%.

    What is offloaded is in the same memory here, which is that of the host.
    """
    (tmp_path / "config.json").write_text(json.dumps(shape))
    world, parallel = layout
    hf = load_hf_config(tmp_path)
    model = {name: value for name, value in options.items() if name != "offload"}
    offload = "offload" in options
    settings = ModelConfig.model_validate({"hf_config": tmp_path, **model})
    held = rank_parameters(hf, parallel)
    answers = ranks.run(
        measured, parallel, world, folder=tmp_path, parallel=parallel, model=model, offload=offload
    )
    for stage, counts, imbalance, real in answers:
        planned = MemoryModel(
            hf, parallel, settings, world, ROW_TOKENS, ROWS, "torch", imbalance, NO_OVERHEADS, offload
        )
        said = asdict(planned.pipeline()[stage])
        said["optimizer"] += planned.host()[stage]
        standing_kinds = ("weights", "gradients", "optimizer")
        said["step"] = sum(said.values()) - sum(said[kind] for kind in standing_kinds)
        assert counts == held[stage].decoder.total + held[stage].prediction.total
        for kind in standing_kinds:
            assert said[kind] == pytest.approx(real[kind], rel=0.01), (kind, said, real)
        assert sum(said[kind] for kind in real) == pytest.approx(sum(real.values()), rel=0.05), (said, real)
