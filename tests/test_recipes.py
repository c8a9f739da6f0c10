"""The recipes in examples/: their configs, the figures in their READMEs, and short runs of them, shrunk."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_klong.config import ParallelConfig, RlConfig, SftConfig, load_config
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.planner.search import LayoutPlan, Question, plan_layout
from tests.test_rl_run import make_inputs
from tests.test_sft import KLONG, ROOT, metrics

EXAMPLES = ROOT / "examples"
RECIPES: dict[str, type[SftConfig] | type[RlConfig]] = {
    "glm45_air_sft/sft": SftConfig, "glm45_air_rl/rl": RlConfig, "qwen3_30b_a3b/sft": SftConfig
}  # fmt: skip
H100_BYTES = round(80 * 2**30 * 0.99)
ROW = re.compile(
    r"^\| (\d+) \| TP(\d+) CP(\d+) PP(\d+)(?: VPP(\d+))? EP(\d+) DP(\d+) \| (\S+) \| (\d+) "
    r"\| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \| (\d+) s \|$",
    re.M,
)


def recipe(name: str) -> SftConfig | RlConfig:
    return load_config(RECIPES[name], EXAMPLES / f"{name}.yaml")


def planned(config: SftConfig | RlConfig, parallel: ParallelConfig, ranks: int, rows: int) -> LayoutPlan:
    """A layout with the recomputation and the offloading that it needs."""
    hf, model = load_hf_config(config.model.shape), config.model
    row_tokens = config.row_length if isinstance(config, RlConfig) else config.data.row_length
    return plan_layout(Question(hf, model, ranks, H100_BYTES, row_tokens, rows), parallel)


@pytest.mark.parametrize("name", RECIPES)
def test_figures_in_the_readme_are_the_planner_s(name: str) -> None:
    config = recipe(name)
    rows = ROW.findall((EXAMPLES / name).with_name("README.md").read_text())
    assert rows
    layouts = []
    for row in rows:
        gpus, tensor, context, pipeline, virtual, expert, data = (int(ways or 1) for ways in row[:7])
        recompute, batch, gigabytes, on_host, speed, seconds = row[7:]
        parallel = ParallelConfig(
            tensor=tensor, context=context, pipeline=pipeline, virtual=virtual, expert=expert
        )
        layouts.append((parallel, recompute, on_host != "0.0"))
        assert parallel.data(gpus) == data
        plan = planned(config, parallel, gpus, int(batch))
        found = plan.recompute if isinstance(plan.recompute, str) else "+".join(plan.recompute)
        assert plan.fits and found == recompute, plan.reason
        assert f"{plan.fullest.total / 1e9:.1f}" == gigabytes
        assert f"{plan.host_bytes / 1e9:.1f}" == on_host
        assert f"{plan.tokens_per_second / gpus:,.0f}" == speed
        assert round(plan.time.total) == int(seconds)
    ours = config.model.recompute
    again = ours if isinstance(ours, str) else "+".join(ours)
    assert (config.parallel, again, config.optimizer.offload) in layouts


@pytest.mark.parametrize("name", ["glm45_air_sft/sft", "qwen3_30b_a3b/sft"])
def test_a_supervised_recipe_runs_shrunk(name: str, domain_store: Path, tmp_path: Path) -> None:
    """Real ranks at the same kinds of parallelism; the store is the only thing that is not the override's."""
    tiny = EXAMPLES / Path(name).parent / "tiny.yaml"
    config = load_config(SftConfig, EXAMPLES / f"{name}.yaml", [f"@{tiny}"])
    ours, theirs = config.parallel.model_dump(exclude={"nproc"}), recipe(name).parallel.model_dump()
    assert {kind for kind, ways in ours.items() if ways > 1} == {
        kind for kind, ways in theirs.items() if ways and ways > 1
    }
    stores = [f"data.sources.{source}.store={domain_store}" for source in config.data.sources]
    run = tmp_path / "run"
    command = [*KLONG, "sft", f"{EXAMPLES / name}.yaml", f"@{tiny}", f"run.dir={run}", *stores]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(run) if line["kind"] == "train"] == [1, 2, 3, 4]
    assert sorted(each.name for each in (run / "checkpoints").iterdir())[-1] == "step_00000004"


@pytest.mark.timeout(600)
def test_the_reinforcement_learning_recipe_runs_shrunk(tmp_path: Path) -> None:
    """Trainer on 8 ranks, vLLM, sandboxes, two stages; model and tasks are a test's, not the quickstart's."""
    inputs = make_inputs(tmp_path / "inputs")
    model, tokenizer = inputs / "model", inputs / "domain" / "tokenizer"
    run = tmp_path / "run"
    settings = [
        f"@{EXAMPLES}/glm45_air_rl/tiny.yaml", f"run.dir={run}", f"model.hf_config={model}",
        f"model.weights={model}", f"server.model={model}", f"tokenizer={tokenizer}",
        f"tasks.train={inputs}/domain/tasks", f"tasks.held_out={inputs}/held-out/tasks",
    ]  # fmt: skip
    command = [*KLONG, "rl", f"{EXAMPLES}/glm45_air_rl/rl.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((run / "summary.json").read_text())["iterations"]) == 2
