"""What a run would be, found out without one: everything resolved, its model built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.config import ModelConfig, SftConfig, TrainerSettings
from megatron_klong.data.curriculum import Curriculum
from megatron_klong.data.dataset import build_datasets
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout
from megatron_klong.model.parameters import ParameterCounts, parameter_counts
from megatron_klong.planner.activations import WEIGHT_BYTES
from megatron_klong.platform import activate
from megatron_klong.training.meta_model import model_of_rank

_OPTIMIZER_BYTES = 12


@dataclass(frozen=True)
class PipelineRankPlan:
    """A place in the pipeline, with one stage or several.

    Attributes:
        rank: the first one there; all of them hold equally much.
        parameters: that it holds.
    """

    rank: int
    parameters: int


@dataclass(frozen=True)
class SourcePlan:
    """Windows of a source."""

    name: str
    train_windows: int
    held_out_windows: int
    train_tokens: int


@dataclass(frozen=True)
class PhasePlan:
    """A phase; ``tokens`` is about right."""

    name: str
    first_step: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class SftPlan:
    """A whole run.

    Attributes:
        ranks: of the layout.
        micro_batches: of every rank in a step.
        checkpoint_bytes: of one.
        disk_bytes: of all that exist at one time, those kept for good included.
    """

    parameters: ParameterCounts
    layout: str
    ranks: int
    pipeline: tuple[PipelineRankPlan, ...]
    sources: tuple[SourcePlan, ...]
    phases: tuple[PhasePlan, ...]
    steps: int
    rows_per_step: int
    row_tokens: int
    micro_batches: int
    checkpoint_bytes: int
    disk_bytes: int


def plan_sft(config: SftConfig) -> SftPlan:
    """Resolve a run of ``parallel.world_size`` ranks.

    Raises:
        ValueError: what settings, data and layout would stop the run with; not what the machine lacks.
    """
    activate()
    hf = load_hf_config(config.model.shape)
    sources = build_datasets(config.data, config.run.seed)
    curriculum = Curriculum(config.data, sources, config.training.global_batch_rows, config.run.seed)
    settings = config.trainer_settings(curriculum.steps)
    ranks = config.parallel.world_size
    size = checkpoint_bytes(hf, config.model)
    return SftPlan(
        parameters=parameter_counts(hf),
        layout=config.parallel.described(ranks),
        ranks=ranks,
        pipeline=_pipeline(hf, settings, ranks),
        sources=tuple(
            SourcePlan(
                name=name,
                train_windows=len(source.train.lengths),
                held_out_windows=0 if source.validation is None else len(source.validation.lengths),
                train_tokens=int(source.train.lengths.sum()),
            )
            for name, source in sources.items()
        ),
        phases=tuple(
            PhasePlan(phase.name, phase.first_step, phase.steps, phase.tokens) for phase in curriculum.phases
        ),
        steps=curriculum.steps,
        rows_per_step=config.training.global_batch_rows,
        row_tokens=config.data.row_length,
        micro_batches=config.training.global_batch_rows // config.parallel.data(ranks),
        checkpoint_bytes=size,
        disk_bytes=size * _most_checkpoints(config, curriculum.steps),
    )


def checkpoint_bytes(hf: DecoderConfig, model: ModelConfig) -> int:
    """Of a checkpoint: weights, and of those that are trained an fp32 copy and two moments.

    Files have about 2 kB more for each tensor and rank. The fp32 copy is stored of fp32 weights too.
    """
    counts = parameter_counts(hf)
    trained = counts.total + (counts.prediction if model.prediction == "train" else 0)
    weights = WEIGHT_BYTES[model.precision] * (counts.total + counts.prediction)
    bias = 0
    if hf.moe is not None and hf.moe.expert_bias:
        layers = sum(hf.is_moe_layer(n) for n in range(hf.num_hidden_layers + hf.prediction_layers))
        bias = 4 * layers * hf.moe.experts
    return weights + bias + _OPTIMIZER_BYTES * trained


def _most_checkpoints(config: SftConfig, steps: int) -> int:
    """Those kept, and the one that is being written before an old one goes."""
    training = config.training
    saved = {steps, *(range(training.save_every, steps, training.save_every) if training.save_every else ())}
    for_good = {step for step in saved if training.keep_every and step % training.keep_every == 0}
    last = sorted(saved)[-training.keep_last - 1 :]
    return len(for_good | set(last))


def _pipeline(hf: DecoderConfig, settings: TrainerSettings, ranks: int) -> tuple[PipelineRankPlan, ...]:
    check_layout(hf, settings.parallel)
    each = ranks // settings.parallel.pipeline
    places = []
    for rank in range(0, ranks, each):
        model = model_of_rank(hf, settings, rank, ranks)
        places.append(PipelineRankPlan(rank, sum(weight.numel() for weight in model.parameters())))
    return tuple(places)
