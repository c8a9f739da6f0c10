"""``klong plan``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.cli.shared import AsJson, print_json
from megatron_klong.config import ModelConfig, Recompute, preset_names
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.parameters import ParameterCounts, parameter_counts
from megatron_klong.planner.memory import RankMemory
from megatron_klong.planner.search import LayoutPlan, Plan, Question, search
from megatron_klong.planner.serving import Serving, plan_serving
from megatron_klong.planner.speed import H100

_GB = 1e9
_USABLE = 0.99
"""Share of a device's memory that the driver leaves: an H100 of 80 GB shows 79.6 GiB."""


def plan(
    model: Annotated[str, typer.Option(help="Name of a preset, a config.json, or the folder of one.")],
    gpus: Annotated[int, typer.Option(min=1, help="Devices, all together.")],
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a row: the longest window.")],
    gpu_memory: Annotated[
        float, typer.Option(min=1, help="Memory of a device, GiB; the driver keeps 1%.")
    ] = 80.0,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a global batch. Default: 64, or what GPUs divide."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    task: Annotated[
        str, typer.Option(help="`sft`: all devices train; `rl`: some serve the model to rollouts.")
    ] = "sft",
    serving: Annotated[
        int | None, typer.Option(min=1, help="With `--task rl`, devices that serve. Default: half.")
    ] = None,
    prediction: Annotated[bool, typer.Option("--prediction", help="Train prediction layers along.")] = False,
    show: Annotated[int, typer.Option(min=1, help="Layouts to show of each kind.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Write the best layout's settings to this YAML file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find layouts that hold a model: memory of a device by kind, speed by a cost model, settings to use.

    Needs neither GPUs nor torch. What does not fit is listed with the reason; exits with 1 if nothing fits.
    docs/planner.md has the formulas, what they were checked against, and what was not.

    Example: klong plan --model glm-4.5-air --gpus 64 --seq 131072
    """
    training = gpus - _serving_devices(task, gpus, serving)
    settings = _model(model, prediction=prediction)
    hf, device_bytes = load_hf_config(settings.shape), round(gpu_memory * 2**30 * _USABLE)
    question = Question(
        hf, settings, training, device_bytes, seq, rows or -(-64 // training) * training,
        hardware=replace(H100, node=gpus_per_node),
    )  # fmt: skip
    found, counts = search(question), parameter_counts(hf)
    servers = plan_serving(hf, gpus - training, gpus_per_node, device_bytes, seq) if task == "rl" else None
    text = ""
    if found.fitting and (task == "sft" or servers is not None):
        text = settings_text(found.fitting[0], question, servers)
    if out is not None:
        if not text:
            raise ValueError(f"--out {out}: no layout fits, so there is nothing to write")
        out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(_answer(counts, question, found, servers, show))
    else:
        _print(model, counts, question, found, show)
        if task == "rl":
            _print_serving(servers, gpus - training, question)
        if text:
            print(f"\nsettings of the first:\n{text}", end="")
    if not text:
        raise typer.Exit(1)


def _model(model: str, *, prediction: bool) -> ModelConfig:
    """Of a preset's name, or a path."""
    shape = {"preset": model} if model in preset_names() else {"hf_config": model}
    settings = ModelConfig.model_validate({**shape, "prediction": "train" if prediction else "leave"})
    if prediction and not load_hf_config(settings.shape).prediction_layers:
        raise ValueError(f"--prediction: {model} has no prediction layers; leave it out")
    return settings


def _serving_devices(task: str, gpus: int, serving: int | None) -> int:
    if task not in ("sft", "rl"):
        raise ValueError(f"--task {task}: choose sft or rl")
    if task == "sft":
        if serving is not None:
            raise ValueError(f"--serving {serving} goes with --task rl")
        return 0
    chosen = gpus // 2 if serving is None else serving
    if not 0 < chosen < gpus:
        raise ValueError(f"--serving {chosen} of --gpus {gpus}: some must serve, and some train")
    return chosen


@dataclass(frozen=True)
class _Layout:
    """A layout in JSON; bytes by kind are of the pipeline rank that needs most."""

    tensor: int
    context: int
    pipeline: int
    virtual: int
    expert: int
    data: int
    recompute: Recompute
    offload: bool
    micro_batches: int
    fits: bool
    reason: str | None
    memory_bytes: RankMemory
    memory_bytes_total: int
    host_bytes: int
    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class _Answer:
    """The JSON answer."""

    parameters_total: int
    parameters_active: int
    parameters_prediction: int
    device_bytes: int
    rows: int | None
    row_tokens: int
    layouts: tuple[_Layout, ...]
    not_fitting: tuple[_Layout, ...]
    impossible: dict[str, int]
    serving: Serving | None


def _answer(
    counts: ParameterCounts, question: Question, found: Plan, servers: Serving | None, show: int
) -> _Answer:
    def layouts(plans: tuple[LayoutPlan, ...]) -> tuple[_Layout, ...]:
        return tuple(
            _Layout(
                each.parallel.tensor, each.parallel.context, each.parallel.pipeline, each.parallel.virtual,
                each.parallel.expert, each.parallel.data(question.ranks), each.recompute, each.offload,
                each.micro_batches, each.fits, each.reason, each.fullest, each.fullest.total,
                each.host_bytes, each.time.total, each.tokens_per_second,
            )
            for each in plans[:show]
        )  # fmt: skip

    return _Answer(
        counts.total, counts.active, counts.prediction, question.device_bytes, question.rows,
        question.row_tokens, layouts(found.fitting), layouts(found.others), found.impossible, servers,
    )  # fmt: skip


def _print(model: str, counts: ParameterCounts, question: Question, found: Plan, show: int) -> None:
    print(
        f"{model}: {counts.total:,} parameters, {counts.active:,} active; {question.ranks} devices of "
        f"{question.device_bytes / _GB:.1f} GB train, {question.rows} rows of {question.row_tokens:,} tokens"
    )
    kinds = [field.name for field in fields(RankMemory)]
    if found.fitting:
        print(f"{len(found.fitting)} layouts fit. GB of the fullest rank, tokens/s by the cost model:\n")
        short = {"optimizer": "optim", "activations": "activ", "temporary": "temp", "communication": "comm"}
        heads = [short.get(kind, kind)[:7] for kind in kinds]
        print(
            f"{'layout':<31} {'computed again, in host memory':<34}"
            + "".join(f"{head:>8}" for head in heads)
            + "   total  tok/s/GPU"
        )
        for each in found.fitting[:show]:
            memory = each.fullest
            numbers = "".join(f"{getattr(memory, kind) / _GB:8.1f}" for kind in kinds)
            speed = each.tokens_per_second / question.ranks
            print(
                f"{each.parallel.name(question.ranks):<31} {_saving(each):<34}{numbers}"
                f"{memory.total / _GB:8.1f}{speed:11,.0f}"
            )
    else:
        print("no layout fits")
    if found.others:
        print(f"\n{len(found.others)} do not fit; the nearest:")
        for each in found.others[: min(show, 4)]:
            print(f"  {each.parallel.name(question.ranks)}: {each.reason}")
    for reason, count in found.impossible.items():
        print(f"  {count} cannot be: {reason}")


def _print_serving(servers: Serving | None, gpus: int, question: Question) -> None:
    if servers is None:
        print(f"\nserving: {gpus} devices do not hold the weights and one context; give more to --serving")
        return
    print(
        f"\nserving: {servers.servers} servers of {servers.tensor_parallel} devices, "
        f"{servers.contexts} contexts of {question.row_tokens:,} tokens at a time "
        f"({servers.context_bytes / _GB:.1f} GB each)"
    )


def _saving(each: LayoutPlan) -> str:
    again = each.recompute if isinstance(each.recompute, str) else "+".join(each.recompute)
    return again + (", moments" if each.offload else "")


def settings_text(best: LayoutPlan, question: Question, servers: Serving | None) -> str:
    """YAML to merge into the config of a supervised run or, where there are servers, of a reinforcement
    learning run."""
    import yaml

    parallel = best.parallel
    recompute = best.recompute if isinstance(best.recompute, str) else list(best.recompute)
    # The one that it is not named by as null: so it replaces whatever a config names.
    shape = question.model.model_dump(mode="json", include={"preset", "hf_config"})
    values = {
        "model": {**shape, "precision": question.model.precision, "recompute": recompute,
                  "prediction": question.model.prediction},
        "parallel": {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline,
                     "virtual": parallel.virtual, "expert": parallel.expert},
        "optimizer": {"offload": best.offload},
        **(_sft_rows(question) if servers is None else _rl_rows(question, servers)),
    }  # fmt: skip
    return yaml.safe_dump(values, sort_keys=False)


def _sft_rows(question: Question) -> dict[str, dict[str, int]]:
    assert question.rows is not None
    return {
        "data": {"row_tokens": question.row_tokens},
        "training": {"global_batch_rows": question.rows},
    }


def _rl_rows(question: Question, servers: Serving) -> dict[str, object]:
    return {
        "trainer": {"row_tokens": question.row_tokens},
        "server": {
            "max_model_len": question.row_tokens,
            "tensor_parallel": servers.tensor_parallel,
            "transfer": "nccl",  # to other GPUs than the trainer's, on whatever machine
        },
        "servers": servers.servers,
    }
