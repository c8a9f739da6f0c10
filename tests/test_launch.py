"""`klong launch`: nemo-run's own executors, in the environment that is made for it (no torch in it)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_klong.config import LaunchConfig, load_config
from megatron_klong.data.tokenize import tokenize
from tests.slurm_cluster import SlurmCluster
from tests.test_rl_run import commands, make_inputs, write_config
from tests.test_sft import ROOT, metrics
from tests.test_slurm import steps, until

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def klong() -> Path:
    """The command in the light environment."""
    command = Path(f"{sys.prefix}-launch") / "bin" / "klong"
    if not command.is_file():
        pytest.skip("nemo-run has an environment of its own, which is not there: make launch-env")
    return command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, tokenizer, tasks, and the tasks' trajectories tokenized."""
    folder = make_inputs(tmp_path_factory.mktemp("chain-inputs"))
    domain = folder / "domain"
    trajectories, tokenizer = domain / "trajectories.jsonl", domain / "tokenizer"
    tokenize(trajectories, folder / "store", renderer="glm-4.5", tokenizer=tokenizer)
    return folder


def launch(
    klong: Path, *arguments: str | Path, code: int = 0, environment: dict[str, str] | None = None
) -> str:
    command = [str(klong), "launch", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write(folder: Path, steps: dict[str, Any], **more: Any) -> Path:
    file = folder / "launch.yaml"
    settings = {
        "name": "chain", "home": str(ROOT), "state": str(folder / "state"), "venv": sys.prefix,
        "steps": steps,
        "slurm": {"account": "us", "cpus_per_task": 1, "exclusive": False, "time": "00:20:00"}, **more,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def chain(folder: Path, inputs: Path) -> dict[str, Any]:
    """From a Hugging Face folder through SFT on two ranks and back, then reinforcement learning."""
    start, run, exported = folder / "start", folder / "sft", folder / "exported"
    rl, tokenizer = write_config(folder, inputs), inputs / "domain" / "tokenizer"
    sft = [
        "sft", "examples/quickstart/sft.yaml", f"run.dir={run}", f"model.hf_config={inputs}/model",
        f"model.weights={start}", f"data.sources.replication.store={inputs}/store",
        "data.window.max_tokens=160", "data.window.overlap_tokens=24", "data.row_tokens=320",
        "data.validation_fraction=0",
        "data.phases.train.steps=2", "optimizer.warmup_steps=1",
        "training.global_batch_rows=2",
        "parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2",
    ]  # fmt: skip
    return {
        "convert": {"run": ["convert", "import", f"{inputs}/model", str(start)]},
        "sft": {"run": sft, "after": ["convert"], "nodes": {"count": 2}},
        "export": {
            "run": ["convert", "export", str(run), str(exported), "--tokenizer", str(tokenizer)],
            "after": ["sft"],
        },
        "rl": {
            "run": ["rl", str(rl), f"model.weights={exported}", f"server.model={exported}",
                "stages=[{limit: 60, iterations: 1}]"],
            "after": ["export"], "roles": {"server": {}, "trainer": {"tasks": 2}},
        },
    }  # fmt: skip


def check_chain(folder: Path, inputs: Path) -> None:
    """Each step went on from what the one before has made."""
    config = yaml.safe_load((folder / "sft" / "config.yaml").read_text())
    assert config["model"]["weights"] == str(folder / "start")
    assert (folder / "sft" / "checkpoints" / "step_00000002").is_dir()
    before, after = (
        json.loads((each / "config.json").read_text()) for each in (inputs / "model", folder / "exported")
    )
    assert before["hidden_size"] == after["hidden_size"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert len(summary["iterations"]) == 1


def test_a_chain_on_this_machine(klong: Path, inputs: Path, tmp_path: Path) -> None:
    file = write(tmp_path, chain(tmp_path, inputs))
    said = launch(klong, file)
    check_chain(tmp_path, inputs)
    assert re.findall(r"^(\w+) +done; logs in", said, re.M) == ["convert", "sft", "export", "rl"]
    again = launch(klong, file)
    assert re.findall(r"^(\w+) +done before$", again, re.M) == ["convert", "sft", "export", "rl"]


def test_what_needs_a_failed_step_does_not_start(klong: Path, tmp_path: Path) -> None:
    """And when the cause is mended, what was done is not done again."""
    file = write(tmp_path, {
        "one": {"run": ["model", "show", "tiny-qwen3"]},
        "two": {"run": ["model", "show", "$(touch x) no such"], "after": ["one"]},
        "three": {"run": ["model", "list"], "after": ["two"]},
    })  # fmt: skip
    said = launch(klong, file, code=1)
    assert "error: $(touch x) no such: no config.json here" in said
    assert re.search(r"^two    failed with exit code 2; logs in ", said, re.M)
    assert re.search(r"^three  not started$", said, re.M)
    said = launch(klong, file, "steps.two.run=[model, list]")
    assert re.search(r"^one    done before$", said, re.M) and re.search(r"^three  done;", said, re.M)
    # Done again with what needs it; and what comes after a change is no more done than the change.
    again = launch(klong, file, "--again", "two", "steps.two.run=[model, list]")
    assert re.findall(r"^(\w+) +done;", again, re.M) == ["two", "three"]
    changed = launch(
        klong, file, "steps.one.run=[model, list]", "steps.two.run=[model, show, nothing]", code=1
    )
    assert re.findall(r"^(\w+) +(done|failed|not started)", changed, re.M) == [
        ("one", "done"), ("two", "failed"), ("three", "not started")
    ]  # fmt: skip


def test_a_chain_on_slurm(klong: Path, inputs: Path, tmp_path: Path, cluster: SlurmCluster) -> None:
    """All submitted at once, each waiting for the one before; the last a heterogeneous job of three roles."""
    file = write(tmp_path, chain(tmp_path, inputs), executor="slurm")
    said = launch(klong, file, environment=cluster.environment)
    jobs = dict(re.findall(r"^(\w+) +submitted as job (\d+)", said, re.M))
    assert list(jobs) == ["convert", "sft", "export", "rl"]
    assert f"afterok:{jobs['convert']}" in cluster.field(jobs["sft"], "Dependency")
    assert cluster.field(jobs["sft"], "NumNodes").startswith("2")
    for name, job in jobs.items():
        state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
        logs = [path.read_text()[-3000:] for path in (tmp_path / "state").rglob("*.out")]
        assert state == "COMPLETED", f"{name} {state}\n" + "\n".join(logs)
    check_chain(tmp_path, inputs)
    assert len(list((tmp_path / "state" / "logs").glob("klong-*/attempt-0/nodes.txt"))) == 4


def test_a_failure_on_slurm(klong: Path, tmp_path: Path, cluster: SlurmCluster) -> None:
    """Its code is that of the task that failed, though srun ends the other; what waits for it stays."""
    file = write(tmp_path, {
        "bad": {"run": ["sft", "examples/quickstart/sft.yaml", "optimizer.lrr=1"], "nodes": {"count": 2}},
        "next": {"run": ["model", "list"], "after": ["bad"]},
    }, executor="slurm")  # fmt: skip
    said = launch(klong, file, environment=cluster.environment)
    jobs = dict(re.findall(r"^(\w+) +submitted as job (\d+)", said, re.M))
    assert cluster.wait(jobs["bad"], "FAILED", "COMPLETED") == "FAILED"
    assert cluster.field(jobs["bad"], "ExitCode") == "2:0" and cluster.field(jobs["bad"], "Restarts") == "0"
    assert cluster.wait(jobs["next"], "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"


def test_a_stopped_step_goes_on_and_is_not_submitted_twice(
    klong: Path, inputs: Path, tmp_path: Path, cluster: SlurmCluster
) -> None:
    """Both ranks are told to stop, as before the time limit: saved, queued again, and on from there."""
    sft = chain(tmp_path, inputs)["sft"]
    sft = {**sft, "after": [], "run": [*sft["run"], "model.weights=null", "data.phases.train.steps=300"]}
    file = write(tmp_path, {"sft": sft}, executor="slurm")
    said = launch(klong, file, environment=cluster.environment)
    (job,) = re.findall(r"^sft +submitted as job (\d+)", said, re.M)
    until(lambda: steps(tmp_path / "sft") >= 2)
    assert f"step sft of chain is job {job} (RUNNING)" in launch(
        klong, file, code=2, environment=cluster.environment
    )
    cluster.run("scancel", "--signal=TERM", job)
    until(lambda: cluster.field(job, "Restarts") == "1" and cluster.field(job, "JobState") == "RUNNING")
    (output,) = (tmp_path / "state").rglob("sbatch_*.out")
    assert "stopped before the time limit; queued again" in output.read_text()
    known = steps(tmp_path / "sft")
    until(lambda: steps(tmp_path / "sft") > known)  # after its checkpoint, not from the beginning
    numbers = [line["step"] for line in metrics(tmp_path / "sft") if line["kind"] == "train"]
    assert numbers == list(range(1, len(numbers) + 1))
    cluster.run("scancel", job)
    assert cluster.wait(job, "CANCELLED", "FAILED", "COMPLETED") == "CANCELLED"
    assert not (tmp_path / "state" / "sft.done").exists()


def test_a_launch_that_is_told_to_stop(klong: Path, inputs: Path, tmp_path: Path) -> None:
    """Ctrl-C: the step saves and ends, what waits for it does not start, and the next launch goes on."""
    sft = chain(tmp_path, inputs)["sft"]
    sft = {**sft, "after": [], "run": [*sft["run"], "model.weights=null", "data.phases.train.steps=9999"]}
    file = write(tmp_path, {"sft": sft, "next": {"run": ["model", "list"], "after": ["sft"]}})
    command = [str(klong), "launch", str(file)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: steps(tmp_path / "sft") >= 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 1
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert re.search(r"^sft   stopped; logs in ", said, re.M) and re.search(
        r"^next  not started$", said, re.M
    )
    assert list((tmp_path / "sft" / "checkpoints").glob("step_*"))
    assert not [line for line in commands().values() if str(tmp_path / "sft") in line]


def test_sbatch_that_refuses(klong: Path, tmp_path: Path, cluster: SlurmCluster) -> None:
    file = write(tmp_path, {"one": {"run": ["model", "list"]}}, executor="slurm")
    said = launch(klong, file, "slurm.partition=h100", code=2, environment=cluster.environment)
    assert (
        said.startswith("error: sbatch refused one_sbatch.sh, and nothing is submitted: ")
        and "invalid partition specified: h100" in said
    )


def test_a_dry_run_prints_the_batch_scripts(klong: Path, tmp_path: Path, inputs: Path) -> None:
    file = write(tmp_path, chain(tmp_path, inputs), executor="slurm")
    said = launch(klong, file, "--dry-run", "slurm.options.qos=high")
    scripts = re.split(r"^#### (\w+)\n", said, flags=re.M)[1:]
    assert scripts[::2] == ["convert", "sft", "export", "rl"]
    sft, rl = scripts[3], scripts[7]
    assert "#SBATCH --nodes=2" in sft and "#SBATCH --qos=high" in sft and "#SBATCH --signal=TERM@600" in sft
    assert rl.count("#SBATCH hetjob") == 2 and rl.count("srun --het-group=") == 3
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("executor", ["local", "slurm", "docker"])
@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples" / "nemo_run").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_examples_can_be_launched(klong: Path, tmp_path: Path, file: Path, executor: str) -> None:
    said = launch(klong, file, f"executor={executor}", f"home={ROOT}", f"state={tmp_path}", "--dry-run")
    steps = load_config(LaunchConfig, file, []).steps
    assert re.findall(r"^#### (\w+)$", said, re.M) == list(steps)
    for step in steps.values():
        if step.run[0] in ("sft", "rl"):
            assert (ROOT / step.run[1]).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"executor": "docker"}, "executor=docker needs the section docker:"),
        ({"steps": {"a": {"run": ["model"], "after": ["b"]}}}, "steps.a.after: b is no step before it"),
        ({"steps": {"a": {"run": ["model", "/x/nemo_run/y"]}}}, "holds '/nemo_run', which nemo-run rewrites"),
        (
            {"steps": {"a": {"run": ["model"], "roles": {"trainer": {}, "server": {}}}}},
            "roles are of `klong rl`",
        ),
        ({"steps": {"A": {"run": ["model"]}}}, "steps.A.[key]='A': String should match pattern"),
        ({"steps": {"a": {"run": ["rl", "--json", "c.yaml"]}}}, "name the config right after 'rl'"),
        ({"steps": {"a": {"run": ["sft", "c.yaml", "--fresh"]}}}, "--fresh would delete the run whenever"),
        (
            {"steps": {"a": {"run": ["sft", "c.yaml"], "time": "00:10:00"}}},
            "steps.a: a time limit of 00:10:00 is over before slurm.signal_seconds=600 are; make it longer",
        ),
        ({"home": "/nowhere"}, "home=/nowhere is no checkout"),
        ({"venv": "/nowhere"}, "venv=/nowhere: no /nowhere/bin/klong; run make install there"),
    ],
)
def test_what_cannot_be_launched(klong: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, **{"steps": {"a": {"run": ["model", "list"]}}, **change})
    said = launch(klong, file, code=2)
    assert message in said and "Traceback" not in said


def test_the_other_environment_says_where_nemo_run_is(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": {"run": ["model", "list"]}})
    here = Path(sys.executable).parent / "klong"
    assert "it has an environment of its own: make launch-env" in launch(here, file, code=2)
