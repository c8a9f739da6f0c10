"""Layouts that the planner finds, against published ones, and what users see of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from typer.testing import CliRunner, Result

from megatron_klong.cli import app
from megatron_klong.config import (
    ModelConfig,
    ParallelConfig,
    RlConfig,
    SftConfig,
    load_config,
    preset_file,
    preset_names,
)
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout
from megatron_klong.model.parameters import parameter_counts, rank_parameters
from megatron_klong.model.stages import stage_layers
from megatron_klong.planner.memory import NO_OVERHEADS, MemoryModel
from megatron_klong.planner.schedule import backward_moments
from megatron_klong.planner.search import Question, plan_layout, search
from megatron_klong.training import memory_check
from tests.test_sft import ROOT, arguments

GIB = 2**30
H100 = 80 * 0.99  # GiB
AIR, QWEN_30B, QWEN_235B = "glm-4.5-air", "qwen3-30b-a3b", "qwen3-235b-a22b"


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def question(model: str, ranks: int, gib: float, row_tokens: int, rows: int, **settings: Any) -> Question:
    return Question(
        load_hf_config(preset_file(model)), ModelConfig.model_validate({"preset": model, **settings}), ranks,
        round(gib * GIB), row_tokens, rows, imbalance=1.0, offloads=(False,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "stages", "held"),
    [
        (46, 4, (11, 12, 12, 11)), (46, 2, (23, 23)), (46, 8, (5, 6, 6, 6, 6, 6, 6, 5)), (4, 3, (1, 2, 1)),
        (94, 16, (5, *(6,) * 14, 5)), (3, 2, (2, 1)), (5, 5, (1,) * 5), (5, 4, (1, 2, 1, 1)), (7, 1, (7,)),
    ],
)  # fmt: skip
def test_layers_of_stages(layers: int, stages: int, held: tuple[int, ...]) -> None:
    assert stage_layers(layers, stages) == held


def test_no_stage_is_empty_and_none_much_fuller() -> None:
    """Embedding and head counted as a layer each, the fullest stage is as little full as can be."""
    for layers in range(1, 60):
        for stages in range(1, layers + 1):
            held = stage_layers(layers, stages)
            loads = [n + (s == 0) + (s == stages - 1) for s, n in enumerate(held)]
            assert sum(held) == layers and min(held) >= 1 and len(held) == stages
            if layers % stages:
                ends = max(held[0], held[-1]) == 1  # an end with one layer cannot have fewer
                assert max(loads) <= -(-(layers + 2) // stages) or ends, (layers, stages, held)


def test_published_parameter_counts() -> None:
    """As counted on other implementations (docs/model.md)."""
    air = parameter_counts(load_hf_config(preset_file(AIR)))
    assert (air.total, air.active, air.prediction) == (106_852_245_504, 13_424_123_904, 2_375_059_456)
    qwen = parameter_counts(load_hf_config(preset_file(QWEN_30B)))
    assert (qwen.total, qwen.active) == (30_532_122_624, 3_353_032_704)


@pytest.mark.parametrize("model", preset_names())
def test_ranks_together_hold_the_model(model: str) -> None:
    """What is split is there once over all ranks; what is copied, once on each."""
    hf = load_hf_config(preset_file(model))
    whole = parameter_counts(hf)
    for tensor, pipeline, expert in itertools.product((1, 2), (1, 2), (1, 2) if hf.moe else (1,)):
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
        check_layout(hf, parallel)
        stages = rank_parameters(hf, parallel)
        norms_and_routers = (
            sum(
                2 * hf.hidden_size
                + (2 * hf.head_dim if hf.qk_norm else 0)
                + (hf.moe.experts * hf.hidden_size if hf.moe and hf.is_moe_layer(layer) else 0)
                for layer in range(hf.num_hidden_layers)
            )
            + hf.hidden_size
        )
        dense = tensor * sum(stage.decoder.dense for stage in stages) - (tensor - 1) * norms_and_routers
        experts = expert * sum(stage.decoder.experts for stage in stages)
        words = hf.vocab_size * hf.hidden_size
        copies = words if pipeline > 1 and (hf.tie_word_embeddings or hf.prediction_layers) else 0
        assert dense + experts == whole.total + copies


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"),
    [
        *itertools.product((2, 4), (1,), (2, 3, 4, 8, 24)), *itertools.product((2, 4), (2, 3), (4, 8, 24)),
        (3, 2, 3), (3, 2, 12),
    ],
)  # fmt: skip
def test_what_is_under_way_is_megatrons(pipeline: int, virtual: int, micro_batches: int) -> None:
    """Its own tables of the order, and of how many forward passes come first."""
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        communicator: Any = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        total, _, warm_up, _ = get_pp_rank_microbatches(
            micro_batches, virtual, pipeline, p2p_communicator=communicator
        )
        order = [stage for _, stage in get_schedule_table(micro_batches, virtual, pipeline)]
        passes = [("forward", stage) for stage in order[:warm_up]]
        for place, stage in enumerate(order):
            passes += [("forward", each) for each in order[warm_up + place : warm_up + place + 1]]
            passes.append(("backward", virtual - 1 - stage))
        expected, kept = set(), [0] * virtual
        for kind, stage in passes:
            if kind == "backward":
                expected.add((stage, tuple(kept)))
            kept[stage] += 1 if kind == "forward" else -1
        assert len(passes) == 2 * total and kept == [0] * virtual
        found = set(backward_moments(pipeline, virtual, micro_batches, rank))
        assert found <= expected
        # Those that are left out come when the step runs out, and have less under way.
        most = {stage: max(sum(k) for s, k in expected if s == stage) for stage in range(virtual)}
        assert most == {stage: max(sum(k) for s, k in found if s == stage) for stage in range(virtual)}


PUBLISHED_STATES = [
    # Model, ranks, layout, GB of weights, gradients and optimizer: a fork of slime on 32 H200 with fp32
    # gradients and no offload saw 124 to 128 GB before the first step.
    (AIR, 32, ParallelConfig(tensor=4, expert=8), 124.0, 128.0),
]


@pytest.mark.parametrize(("model", "ranks", "parallel", "least", "most"), PUBLISHED_STATES)
def test_states_are_as_seen_by_others(
    model: str, ranks: int, parallel: ParallelConfig, least: float, most: float
) -> None:
    hf = load_hf_config(preset_file(model))
    settings = ModelConfig.model_validate({"preset": model, "recompute": "full"})
    (stage,) = MemoryModel(
        hf, parallel, settings, ranks, 4096, 4, "transformer-engine", 1.0, NO_OVERHEADS
    ).pipeline()
    assert least <= (stage.weights + stage.gradients + stage.optimizer) / 1e9 <= most


def test_activations_are_as_measured_by_others() -> None:
    """Megatron-Bridge's figure of Qwen3-30B-A3B on 16 H100 with EP16, nothing computed again, fused kernels.

    62.166 GiB are allocated, of which 32.5 GB are states (gradients in bf16, 10 bytes of optimizer).
    """
    hf = load_hf_config(preset_file(QWEN_30B))
    settings = ModelConfig.model_validate({"preset": QWEN_30B})
    (stage,) = MemoryModel(
        hf, ParallelConfig(expert=16), settings, 16, 4096, 64, "transformer-engine", 1.0, NO_OVERHEADS
    ).pipeline()
    beside_states = stage.activations + stage.temporary + stage.logits + stage.communication
    assert beside_states == pytest.approx(62.166 * GIB - 32.5e9, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "parallel", "fits"),
    [
        # ms-swift, full fine-tuning with full recomputation: 16 x 60 GiB and 8 x 76 GiB were seen.
        (question(QWEN_30B, 16, H100, 8192, 16), ParallelConfig(pipeline=2, expert=8), True),
        (question(QWEN_30B, 8, H100, 8192, 4), ParallelConfig(tensor=4, pipeline=2, expert=4), True),
        (question(QWEN_30B, 8, 64, 8192, 4), ParallelConfig(tensor=4, pipeline=2, expert=4), False),
        # Megatron-Bridge, supervised fine-tuning on 16 H100: has run.
        (question(QWEN_30B, 16, H100, 2048, 32), ParallelConfig(expert=16), True),
        # Megatron-Bridge's Qwen3-235B-A22B: supervised on 64 H100, pretraining on 256; half of 64 is too few.
        (question(QWEN_235B, 64, H100, 2048, 128), ParallelConfig(tensor=4, pipeline=16, expert=4), True),
        (
            question(QWEN_235B, 256, H100, 4096, 512),
            ParallelConfig(tensor=4, pipeline=16, context=2, expert=8), True,
        ),
        # Its benchmarks on H100 with interleaved stages (of 8-bit products, which keep less): have run.
        (question(QWEN_30B, 16, H100, 8192, 256), ParallelConfig(pipeline=2, virtual=24, expert=8), True),
        (
            question(QWEN_235B, 256, H100, 4096, 8192),
            ParallelConfig(tensor=2, pipeline=8, virtual=4, expert=32), True,
        ),
        (question(QWEN_235B, 32, H100, 2048, 128), ParallelConfig(tensor=4, pipeline=8, expert=4), False),
        # GLM-4.5-Air on 32 devices at Megatron-Bridge's layout. Its makers ask for 32 H20 of 96 GiB; with
        # fp32 gradients and optimizer, 80 are not enough (nobody has published such a run) unless moments are
        # in host memory.
        (question(AIR, 32, 96 * 0.99, 2048, 128), ParallelConfig(pipeline=4, expert=8), True),
        (question(AIR, 32, H100, 2048, 128), ParallelConfig(pipeline=4, expert=8), False),
        (
            replace(question(AIR, 32, H100, 2048, 128), offloads=(True,)),
            ParallelConfig(pipeline=4, expert=8), True,
        ),
        (question(AIR, 64, H100, 2048, 128), ParallelConfig(pipeline=4, expert=8), True),
    ],
)  # fmt: skip
def test_layouts_that_are_known_to_run(asked: Question, parallel: ParallelConfig, fits: bool) -> None:
    found = plan_layout(asked, parallel)
    assert found.fits is fits, found.fullest


def test_the_cost_model_is_near_published_runs() -> None:
    """Megatron-Bridge's tokens/s of Qwen3-30B-A3B on each of 16 H100, with an all-to-all dispatcher."""
    layout = ParallelConfig(expert=16)
    for row_tokens, rows, published in ((4096, 1024, 5742), (2048, 32, 3395)):
        found = plan_layout(question(QWEN_30B, 16, 200, row_tokens, rows), layout, ("none",))
        assert found.tokens_per_second / 16 == pytest.approx(published, rel=0.3)


def test_a_search_finds_the_best_that_fits() -> None:
    asked = question("qwen3-0.6b", 8, 24, 8192, 16)
    found = search(asked)
    speeds = [each.tokens_per_second for each in found.fitting]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 5
    assert all(max(each.total for each in plan.memory) <= asked.device_bytes for plan in found.fitting)
    assert all(plan.reason and not plan.fits for plan in found.others)
    smaller = search(replace(asked, device_bytes=6 * 10**9))
    assert 0 < len(smaller.fitting) < len(found.fitting)
    assert {each.recompute for each in smaller.fitting} != {each.recompute for each in found.fitting}


def test_json_is_for_machines() -> None:
    result = plan("--model", AIR, "--gpus", "64", "--gpu-memory", "80", "--seq", "131072", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["parameters_total"], said["parameters_active"]) == (106_852_245_504, 13_424_123_904)
    best = said["layouts"][0]
    assert best["fits"] and sum(best["memory_bytes"].values()) == best["memory_bytes_total"]
    assert best["tensor"] * best["context"] * best["pipeline"] * best["data"] == 64
    assert not said["not_fitting"][0]["fits"] and "rank" in said["not_fitting"][0]["reason"]


def test_settings_are_those_of_a_run(tmp_path: Path) -> None:
    """What is written is understood by the config, and gives the layout that was shown."""
    out = tmp_path / "layout.yaml"
    result = plan("--model", AIR, "--gpus", "64", "--seq", "32768", "--out", str(out))
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(out.read_text())
    parallel = ParallelConfig.model_validate(written["parallel"])
    settings = ModelConfig.model_validate(written["model"])
    check_layout(load_hf_config(settings.shape), parallel)
    shown = next(line for line in result.output.splitlines() if line.startswith("TP"))
    assert shown.startswith(f"{parallel.name(64)} ")


@pytest.mark.parametrize(
    ("task", "kind", "example"), [("sft", SftConfig, "sft.yaml"), ("rl", RlConfig, "rl.yaml")]
)
def test_settings_fit_a_config(
    tmp_path: Path, task: str, kind: type[SftConfig | RlConfig], example: str
) -> None:
    """They override a config of the task as they are."""
    out = tmp_path / "layout.yaml"
    asked = ("--model", QWEN_30B, "--gpus", "48", "--seq", "32768", "--task", task, "--out", str(out))
    result = plan(*asked)
    assert result.exit_code == 0, result.output
    overrides = [f"@{out}", *(["server.dtype=bfloat16"] if task == "rl" else [])]
    config = load_config(kind, ROOT / "examples" / "quickstart" / example, overrides)
    assert config.model.preset == QWEN_30B and config.parallel.tensor * config.parallel.expert > 1


def test_servers_of_a_reinforcement_learning_run() -> None:
    said = json.loads(
        plan(
            "--model", AIR, "--gpus", "128", "--seq", "131072", "--task", "rl", "--serving", "32", "--json"
        ).stdout
    )
    serving, best = said["serving"], said["layouts"][0]
    assert best["tensor"] * best["context"] * best["pipeline"] * best["data"] == 96
    # 213.7 GB of weights need 4 devices of 85 GB. A token has 2 x 46 layers x 8 heads x 128 x 2 bytes.
    assert (serving["tensor_parallel"], serving["servers"]) == (4, 8)
    assert serving["context_bytes"] == 131072 * 2 * 46 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "/nowhere", "--gpus", "8", "--seq", "8192"], "/nowhere: no config.json here"),
        (["--model", AIR, "--gpus", "8", "--seq", "8192", "--task", "dpo"], "--task dpo: choose sft or rl"),
        (["--model", AIR, "--gpus", "8", "--seq", "8192", "--serving", "4"], "goes with --task rl"),
        (["--model", AIR, "--gpus", "1", "--seq", "8192", "--task", "rl"], "some must serve, and some train"),
        (["--model", QWEN_30B, "--gpus", "8", "--seq", "8192", "--prediction"], "has no prediction layers"),
        (["--model", AIR, "--gpus", "1", "--seq", "8192", "--out", "x.yaml"], "no layout fits"),
        (
            ["--model", AIR, "--gpus", "65", "--seq", "8192", "--task", "rl", "--serving", "1", "--out", "x"],
            "no layout fits",  # the trainer's does, but one device holds no server
        ),
    ],
)  # fmt: skip
def test_bad_questions(given: list[str], message: str) -> None:
    result = plan(*given)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_nothing_fits_is_said_with_reasons() -> None:
    result = plan("--model", AIR, "--gpus", "8", "--seq", "8192")
    assert result.exit_code == 1
    assert "no layout fits" in result.output and "even with full recomputation" in result.output


def test_without_torch() -> None:
    """The launcher's environment has none."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'megatron', 'vllm', 'transformers'))\n"
        "from megatron_klong.cli import app; app()"
    )
    command = [sys.executable, "-c", code, "plan", "--model", AIR, "--gpus", "64", "--seq", "8192"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "layouts fit" in done.stdout and done.stderr == ""


def test_a_run_that_cannot_fit_is_refused(domain_store: Path, tmp_path: Path) -> None:
    """Before a rank starts: GLM-4.5-Air is more than this machine has."""
    command = arguments(
        domain_store, tmp_path / "run", "model.hf_config=null", "model.preset=glm-4.5-air",
        "data.row_tokens=8192", "training.global_batch_rows=4",
    )  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: parallel: 4 ranks: TP2 CP1 PP2 EP2 DP1 does not fit: pipeline rank "
    )
    assert "no layout of 4 ranks fits" in done.stderr and "run.check_memory=false" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_offloaded_must_fit_the_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight GPUs of 80 GB that are made up, without Transformer Engine's thrifty norms."""

    def check(*overrides: str, host_gb: int = 1000) -> None:
        monkeypatch.setattr(memory_check, "gpu_bytes", lambda: round(H100 * GIB))
        monkeypatch.setattr(memory_check, "host_bytes", lambda: host_gb * 10**9)
        config = load_config(
            SftConfig, ROOT / "examples" / "qwen3_30b_a3b" / "sft.yaml", ["model.recompute=full", *overrides]
        )
        hf = load_hf_config(config.model.shape)
        memory_check.check_memory(hf, config.trainer_settings(300), 8, 8, config.training.global_batch_rows)

    check()
    with pytest.raises(ValueError, match=r"does not fit: .* optimizer .*; use .* optimizer\.offload=true"):
        check("optimizer.offload=false")
    with pytest.raises(ValueError, match=r"would keep 244\.\d GB in its memory of 500\.0 GB, and 366"):
        check(host_gb=500)


def test_offloading_is_taken_where_it_pays() -> None:
    """Else it is only moved about: with room for all, or where nothing needs to be computed again."""
    tight, roomy = (
        replace(question(QWEN_30B, 8, gib, 32768, 16), offloads=(False, True)) for gib in (H100, 500)
    )
    assert not any(plan.offload for plan in search(roomy).fitting)
    best, without = search(tight).fitting[0], search(replace(tight, offloads=(False,))).fitting
    assert best.offload and best.host_bytes == pytest.approx(8 * 30_532_122_624 / 8, rel=0.01)
    assert not without or best.tokens_per_second > without[0].tokens_per_second
