"""Refuses a run whose ranks lack the memory that it needs. Imports no torch: it is asked before a start."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from megatron_klong.config import TrainerSettings
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.planner.memory import COPY_BYTES, MOMENT_BYTES, OVERHEADS, Overheads
from megatron_klong.planner.search import Question, plan_layout, search
from megatron_klong.platform.memory import gpu_bytes, host_bytes

_CPU_OVERHEADS = Overheads(context=600_000_000, communicator=0, peer=0, fragmentation=0.0)
"""Python, torch and Megatron in a process."""


def check_memory(
    hf: DecoderConfig, settings: TrainerSettings, ranks: int, ranks_here: int, rows: int | None
) -> None:
    """Ask the planner whether every rank fits its GPU or, without GPUs, its share of this machine's memory.

    Args:
        hf: the model's shape.
        settings: of the trainer; the layout fits the shape.
        ranks: of the layout.
        ranks_here: of them, on this machine.
        rows: of a global batch; None where batches differ: then as many as fill the pipeline.

    Raises:
        ValueError: it does not; names what needs most, and a layout that would fit.
    """
    on_gpu = gpu_bytes()
    question = Question(
        hf, settings.model, ranks, on_gpu or host_bytes() // ranks_here, settings.row_tokens, rows,
        "transformer-engine" if importlib.util.find_spec("transformer_engine") else "torch", 1.0,
        OVERHEADS if on_gpu else _CPU_OVERHEADS,
        # Without GPUs there is one memory, whatever is offloaded.
        offloads=(settings.optimizer.offload,) if on_gpu else (False,),
    )  # fmt: skip
    asked = plan_layout(question, settings.parallel, (settings.model.recompute,))
    if asked.fits:
        _check_host(asked.host_bytes * ranks_here)
        return
    searched = replace(
        question, model=settings.model.model_copy(update={"recompute_layers": None}),
        offloads=(False, True) if on_gpu else (False,),
    )  # fmt: skip
    fitting = search(searched).fitting
    if fitting:
        best, parallel = fitting[0], fitting[0].parallel
        recompute = best.recompute if isinstance(best.recompute, str) else f"[{','.join(best.recompute)}]"
        remedy = (
            f"use parallel.tensor={parallel.tensor} parallel.context={parallel.context} "
            f"parallel.pipeline={parallel.pipeline} parallel.virtual={parallel.virtual} "
            f"parallel.expert={parallel.expert} "
            f"'model.recompute={recompute}'" + (" optimizer.offload=true" if best.offload else "")
        )
    else:
        remedy = f"no layout of {ranks} ranks fits; `klong plan` says how many would"
    raise ValueError(
        f"parallel: {settings.parallel.described(ranks)} does not fit: {asked.reason}; {remedy}, or try "
        "all the same with run.check_memory=false"
    )


def _check_host(moments: int) -> None:
    """Refuse to offload more than this machine has, while a checkpoint is written: a copy of everything that
    the optimizer has, of moments and fp32 weights."""
    copy = moments * (MOMENT_BYTES + COPY_BYTES["bf16"]) // MOMENT_BYTES
    if moments + copy > host_bytes():
        raise ValueError(
            f"optimizer.offload=true: the ranks of this machine would keep {moments / 1e9:.1f} GB in its "
            f"memory of {host_bytes() / 1e9:.1f} GB, and {copy / 1e9:.1f} more while a checkpoint is "
            "written; spread the model over more machines, set it to false, or try all the same with "
            "run.check_memory=false"
        )
