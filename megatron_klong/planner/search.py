"""Which layouts hold a model on so many devices, and which of them is fastest by the cost model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_klong.config import ModelConfig, ParallelConfig, Recompute
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.layout import check_layout
from megatron_klong.planner.activations import Kernels
from megatron_klong.planner.memory import OVERHEADS, MemoryModel, Overheads, RankMemory
from megatron_klong.planner.speed import H100, Hardware, StepTime, step_time

RECOMPUTES: tuple[Recompute, ...] = (
    "none", ("layernorm",), ("moe", "mlp"), ("core_attn", "layernorm", "mlp", "moe"), "full",
)  # fmt: skip
"""From what costs least time to what costs least memory."""

VIRTUAL = (2, 3, 4, 6)
"""Stages of a pipeline rank that are tried, beside one."""

_WORTH = 1.01
"""Speed for which more stages are taken: the model of costs is not as exact as its last digits."""


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Args:
        hf: the model's shape.
        model: precision and prediction layers; its recomputation is searched.
        ranks: devices.
        device_bytes: memory of each.
        row_tokens: of a row, the longest sequence.
        rows: of a global batch; None for as many as fill the pipeline of whichever layout.
        kernels: whose layers.
        imbalance: tokens that the busiest rank's experts receive, over the average.
        overheads: beside the tensors.
        hardware: of the cost model.
        offloads: whether moments may stay on the device, and whether they may be in host memory.
    """

    hf: DecoderConfig
    model: ModelConfig
    ranks: int
    device_bytes: int
    row_tokens: int
    rows: int | None
    kernels: Kernels = "transformer-engine"
    imbalance: float = 1.2
    overheads: Overheads = OVERHEADS
    hardware: Hardware = H100
    offloads: tuple[bool, ...] = (False, True)


@dataclass(frozen=True)
class LayoutPlan:
    """A layout with the recomputation that it needs.

    Attributes:
        parallel: the layout.
        recompute: that costs least time of those that fit; if none does, the one that saves most.
        offload: whether Adam's moments are in host memory.
        micro_batches: of each data-parallel rank in a step.
        memory: of a rank of every place in the pipeline.
        host_bytes: of host memory, for a rank that offloads most.
        fits: whether every rank does.
        reason: why not.
        time: of a step.
        tokens_per_second: of all devices together.
    """

    parallel: ParallelConfig
    recompute: Recompute
    offload: bool
    micro_batches: int
    memory: tuple[RankMemory, ...]
    host_bytes: int
    fits: bool
    reason: str | None
    time: StepTime
    tokens_per_second: float

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.memory, key=lambda memory: memory.total)


@dataclass(frozen=True)
class Plan:
    """The answer: layouts that fit, fastest first, others by how little is missing, and how many layouts the
    model or the batch rules out, by reason."""

    fitting: tuple[LayoutPlan, ...]
    others: tuple[LayoutPlan, ...]
    impossible: dict[str, int]


def search(question: Question) -> Plan:
    """Look at every layout of powers of two, and every number of pipeline ranks that divides the devices,
    with as many interleaved stages as pay."""
    plans: list[LayoutPlan] = []
    impossible: Counter[str] = Counter()
    for parallel in _layouts(question):
        reason = _impossible(question, parallel)
        if reason is not None:
            impossible[reason] += 1
            continue
        plans.append(_interleaved(question, plan_layout(question, parallel)))
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: -plan.tokens_per_second)
    others = sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.fullest.total)
    return Plan(tuple(fitting), tuple(others), dict(impossible.most_common()))


def _interleaved(question: Question, plan: LayoutPlan) -> LayoutPlan:
    """The plan, or the same layout with more stages on each pipeline rank. Those keep more and wait less, so
    they are looked at where one stage fits, and taken where they are worth it."""
    best = plan
    for virtual in VIRTUAL if plan.fits and plan.parallel.pipeline > 1 else ():
        layout = plan.parallel.model_copy(update={"virtual": virtual})
        if _impossible(question, layout) is None:
            found = plan_layout(question, layout)
            if found.fits and found.tokens_per_second > _WORTH * best.tokens_per_second:
                best = found
    return best


def plan_layout(
    question: Question, parallel: ParallelConfig, recomputes: tuple[Recompute, ...] = RECOMPUTES
) -> LayoutPlan:
    """The fastest of what fits: with and without offloading, the first recomputation that does. The layout
    must be possible."""
    best: LayoutPlan | None = None
    for offload in question.offloads:
        for recompute in recomputes:
            plan = _plan(question, parallel, recompute, offload)
            if plan.fits:
                break
        if best is None or not best.fits or (plan.fits and plan.tokens_per_second > best.tokens_per_second):
            best = plan
        if best.fits and best.recompute == recomputes[0]:
            break  # what is offloaded costs time too
    assert best is not None
    return best


def _plan(question: Question, parallel: ParallelConfig, recompute: Recompute, offload: bool) -> LayoutPlan:
    data = parallel.data(question.ranks)
    filling = parallel.pipeline * (2 if parallel.virtual > 1 else 1)  # so that all that can be is under way
    micro_batches = filling if question.rows is None else question.rows // data
    model = question.model.model_copy(update={"recompute": recompute})
    memory_model = MemoryModel(
        question.hf, parallel, model, question.ranks, question.row_tokens, micro_batches,
        question.kernels, question.imbalance, question.overheads, offload,
    )  # fmt: skip
    memory, host_bytes = memory_model.pipeline(), max(memory_model.host())
    fits = max(each.total for each in memory) <= question.device_bytes
    time = step_time(
        question.hf, parallel, model, question.ranks, question.row_tokens, micro_batches, question.kernels,
        question.imbalance, question.hardware, host_bytes,
    )  # fmt: skip
    return LayoutPlan(
        parallel, recompute, offload, micro_batches, memory, host_bytes, fits,
        None if fits else _too_large(memory, recompute, offload, question.device_bytes),
        time, data * micro_batches * question.row_tokens / time.total,
    )  # fmt: skip


def _layouts(question: Question) -> Iterator[ParallelConfig]:
    ranks = question.ranks
    powers = [2**n for n in range(ranks.bit_length()) if 2**n <= ranks]
    stages = [n for n in range(1, min(ranks, question.hf.num_hidden_layers) + 1) if ranks % n == 0]
    experts = powers if question.hf.moe else [1]
    for tensor, context, pipeline, expert in itertools.product(powers, powers, stages, experts):
        stage = ranks // pipeline
        if stage % (tensor * context) == 0 and stage % expert == 0:
            yield ParallelConfig(
                tensor=tensor, context=context, pipeline=pipeline, expert=expert, nproc=ranks
            )


def _impossible(question: Question, parallel: ParallelConfig) -> str | None:
    """Why the model or the batch cannot be laid out so, without the layout's numbers."""
    data = parallel.data(question.ranks)
    if parallel.tensor > question.hardware.node:
        return f"tensor parallelism over more than the {question.hardware.node} devices of a node"
    if question.rows is not None and question.rows % (data * parallel.micro_batch_divisor):
        return f"the {question.rows} rows of a batch are no multiple of the data-parallel ranks"
    if question.row_tokens % parallel.row_divisor:
        return f"rows of {question.row_tokens} tokens that its ranks cannot share evenly"
    try:
        check_layout(question.hf, parallel)
    except ValueError as error:
        return str(error).split("; ")[0].partition(" ")[2]
    return None


def _too_large(memory: tuple[RankMemory, ...], recompute: Recompute, offload: bool, device_bytes: int) -> str:
    worst = max(range(len(memory)), key=lambda place: memory[place].total)
    kinds = {field.name: getattr(memory[worst], field.name) for field in fields(RankMemory)}
    largest = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
    named = ", ".join(f"{kind} {kinds[kind] / 1e9:.1f}" for kind in largest)
    done = ""
    if recompute == "full":
        done = f"even with full recomputation{' and moments in host memory' if offload else ''}, "
    return (
        f"{done}pipeline rank {worst} needs {memory[worst].total / 1e9:.1f} GB of {device_bytes / 1e9:.1f} "
        f"(most of it {named})"
    )
