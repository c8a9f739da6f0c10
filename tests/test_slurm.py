"""The scripts in slurm/ on a real Slurm of four nodes, all of them this machine; tiny models on CPUs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.interruptions import Comparison, compare
from tests.slurm_cluster import SlurmCluster
from tests.test_rl_run import make_inputs, write_config
from tests.test_sft import KLONG, ROOT, arguments, losses, metrics, sft

pytestmark = pytest.mark.timeout(600)
SFT, CONVERT, RL = (ROOT / "slurm" / f"{name}.sbatch" for name in ("sft", "convert", "rl"))
CPU = ("--gpus-per-node=0", "--cpus-per-task=1")
LONG = ("data.phases.train.steps=16", "data.row_tokens=1024", "training.global_batch_rows=8")
"""A run that goes on for longer than Slurm takes to miss a node, or to start a second job."""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", *CPU)


@pytest.fixture(scope="module")
def rl_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("rl-inputs"))


def place(folder: Path) -> tuple[str, str]:
    """Options of sbatch: the checkout, from which configs name their files; and the script's log."""
    return f"--chdir={ROOT}", f"--output={folder}/%j.log"


def settings(store: Path, run: Path, *overrides: str) -> list[str]:
    """Arguments of `klong sft`, with a config that can be found from anywhere."""
    config, *rest = arguments(store, run, *overrides)[len(KLONG) + 1 :]
    return [str(ROOT / config), *rest]


def output(cluster: SlurmCluster, job: str) -> str:
    """What a job's script has said, in all attempts."""
    return Path(cluster.field(job, "StdOut")).read_text()


def until(what: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


def steps(run: Path) -> int:
    """Optimizer steps that a run has reported."""
    return sum(line["kind"] == "train" for line in metrics(run)) if (run / "metrics.jsonl").is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(domain_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with, by `klong sft` on its own ranks."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    sft(domain_store, run, *LONG)
    return run


@pytest.mark.parametrize("way", ["requeue", "signal", "lost node"])
def test_a_run_goes_on_after_preemption_with_the_same_losses(
    cluster: SlurmCluster, domain_store: Path, tmp_path: Path, undisturbed: Path, way: str
) -> None:
    """Two nodes of two ranks: put back into the queue, as a preempting job does it; told to save before the
    time limit, and with ranks that meet by their node's name; a node's daemon killed."""
    run = tmp_path / "run"
    submit = cluster.submit_by_name if way == "signal" else cluster.submit
    job = submit(*TWO_NODES, *place(tmp_path), SFT, *settings(domain_store, run, *LONG))
    until(lambda: steps(run) >= 2)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).stdout.split()
    if way == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif way == "signal":
        cluster.run("scancel", "--signal=TERM", job)  # as --signal=TERM@600 does: the steps alone
    else:
        cluster.kill_node(nodes[1])
    assert cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", seconds=300) == "COMPLETED", output(
        cluster, job
    )
    assert cluster.field(job, "Restarts") == "1"
    assert compare(undisturbed, run) == Comparison(steps=16, different=(), repeated=())
    assert losses(run) == losses(undisturbed)
    said = output(cluster, job)
    assert "attempt 0" in said and "attempt 1" in said and said.rstrip().endswith("done")
    logs = cluster.root / "logs" / f"klong-sft-{job}"
    assert sorted(folder.name for folder in logs.iterdir()) == ["attempt-0", "attempt-1"]
    assert "resumed from step_" in (logs / "attempt-1" / "rank-0.log").read_text()
    assert (way == "signal") == ("stopped before the time limit; queued again" in said)
    if way == "lost node":
        cluster.start_node(nodes[1])


def failed(cluster: SlurmCluster, job: str) -> str:
    """What a job says that must fail."""
    assert cluster.wait(job, "FAILED", "COMPLETED", "NODE_FAIL") == "FAILED", output(cluster, job)
    assert cluster.field(job, "ExitCode") != "0:0"
    return output(cluster, job)


def test_a_failing_job_says_why(cluster: SlurmCluster, domain_store: Path, tmp_path: Path) -> None:
    job = cluster.submit(*TWO_NODES, *place(tmp_path), SFT,
                         *settings(domain_store, tmp_path / "run", "optimizer.lrr=1"))  # fmt: skip
    said = failed(cluster, job)
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"
    assert "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?" in said


def test_a_layout_that_does_not_divide_the_tasks(
    cluster: SlurmCluster, domain_store: Path, tmp_path: Path
) -> None:
    job = cluster.submit("--nodes=1", "--ntasks-per-node=2", *CPU, *place(tmp_path), SFT,
                         *settings(domain_store, tmp_path / "run"))  # fmt: skip
    said = failed(cluster, job)
    assert "2 ranks cannot hold tensor=2 x context=1 x pipeline=2 with expert=2; use a multiple of 4" in said


def test_two_jobs_in_one_run_directory(cluster: SlurmCluster, domain_store: Path, tmp_path: Path) -> None:
    """The second is refused, and the first is not disturbed."""
    run = tmp_path / "run"
    ours = settings(domain_store, run, *LONG)
    first = cluster.submit(*TWO_NODES, *place(tmp_path), SFT, *ours)
    until(lambda: steps(run) >= 1)
    second = cluster.submit(*TWO_NODES, *place(tmp_path), SFT, *ours)
    assert "another process is running in it" in failed(cluster, second)
    assert cluster.wait(first, "COMPLETED", "FAILED") == "COMPLETED"
    assert steps(run) == 16


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KLONG_CONTAINER": "docker"}, "KLONG_CONTAINER=docker: choose none, pyxis or apptainer"),
        ({"KLONG_CONTAINER": "apptainer", "KLONG_IMAGE": "/no.sif"}, "KLONG_IMAGE=/no.sif: no such file"),
        ({"KLONG_CONTAINER": "pyxis", "KLONG_IMAGE": "x"}, "this cluster's srun has no --container-image"),
        ({"KLONG_VENV": "/nowhere"}, "KLONG_VENV=/nowhere has no bin/klong"),
        ({"KLONG_LOGS": "/proc/logs"}, "KLONG_LOGS=/proc/logs cannot be written"),
        ({"KLONG_TMP_GIB": "999999"}, "GiB free, less than KLONG_TMP_GIB=999999"),
        ({"KLONG_HOME": "/nowhere"}, "no slurm/common.sh in /nowhere; submit from the checkout's top"),
    ],
)  # fmt: skip
def test_a_site_that_is_set_up_wrong(
    cluster: SlurmCluster, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    job = cluster.submit(*TWO_NODES, *place(tmp_path), SFT, "config.yaml", **environment)
    assert message in failed(cluster, job)


@pytest.mark.parametrize(
    ("wanted", "errors", "remapped", "reason"),
    [
        ("8", "0", "No", "bad n2 1 of 8 GPUs answer"),
        ("1", "3", "No", "bad n2 GPU 1 has 3 uncorrected memory errors"),
        ("1", "[N/A]", "Yes", "bad n2 a GPU could not remap rows of its memory"),
    ],
)
def test_nodes_are_checked_before_the_start(
    cluster: SlurmCluster, tmp_path: Path, wanted: str, errors: str, remapped: str, reason: str
) -> None:
    """With a stand-in for nvidia-smi, which is not here: two GPUs on a node, one on the other."""
    tools = tmp_path / "bin"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\ncase "$*" in *remapped-rows*) echo "0000:01, {remapped}"; exit;; esac\n'
        f'[ "$SLURMD_NODENAME" = n1 ] && echo "0, 5, 0"\necho "1, 5, {errors}"\n'
    )
    smi.chmod(0o755)
    job = cluster.submit(*TWO_NODES, "--nodelist=n[1-2]", *place(tmp_path), SFT, "c.yaml",
                         PATH=f"{tools}:{os.environ['PATH']}", SLURM_GPUS_ON_NODE=wanted)  # fmt: skip
    said = failed(cluster, job)
    assert reason in said and "submit again with --exclude=n1,n2" in said


def test_a_clock_that_is_wrong(cluster: SlurmCluster, tmp_path: Path) -> None:
    """On one node `date` is ten minutes behind."""
    tools = tmp_path / "bin"
    tools.mkdir()
    date = tools / "date"
    date.write_text(
        '#!/bin/bash\n[[ "$SLURMD_NODENAME" == n2 ]] && set -- -d "10 minutes ago" "$@"\n'
        f'exec {shutil.which("date")} "$@"\n'
    )
    date.chmod(0o755)
    job = cluster.submit(*TWO_NODES, "--nodelist=n[1-2]", *place(tmp_path), SFT, "c.yaml",
                         PATH=f"{tools}:{os.environ['PATH']}")  # fmt: skip
    said = failed(cluster, job)
    assert "bad n2 its clock is" in said and "--exclude=n2" in said


def test_a_read_only_run_directory(cluster: SlurmCluster, domain_store: Path, tmp_path: Path) -> None:
    job = cluster.submit(*TWO_NODES, *place(tmp_path), SFT, *settings(domain_store, Path("/sys/run")))
    said = failed(cluster, job)
    assert "error: " in said and "/sys/run" in said


def test_a_partition_that_does_not_exist(cluster: SlurmCluster) -> None:
    done = cluster.run("sbatch", "--partition=h100", *TWO_NODES, SFT, "c.yaml", check=False)
    assert done.returncode == 1 and "invalid partition specified: h100" in done.stderr


def test_conversion_on_a_node(cluster: SlurmCluster, undisturbed: Path, domain: Path, tmp_path: Path) -> None:
    job = cluster.submit(
        "--mem=0", "--cpus-per-task=1", *place(tmp_path), CONVERT, "export", undisturbed,
        tmp_path / "exported", "--tokenizer", domain / "tokenizer",
    )  # fmt: skip
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output(cluster, job)
    assert "93 tensors" in output(cluster, job) and (tmp_path / "exported" / "config.json").is_file()


def test_three_roles_of_reinforcement_learning(
    cluster: SlurmCluster, rl_inputs: Path, tmp_path: Path
) -> None:
    """A heterogeneous job; the server's task is killed on the way and started again."""
    config = write_config(tmp_path, rl_inputs)
    one = ("--nodes=1", *CPU)
    job = cluster.submit(
        *place(tmp_path), *one, ":", "--ntasks-per-node=2", *one, ":", *one, RL, config
    )  # fmt: skip
    run = tmp_path / "run"
    until(lambda: list(run.glob("exchange/done-*")) or "FAILED" in cluster.field(job, "JobState"), 300)
    servers = [
        process for process in psutil.process_iter(["cmdline"])
        if {"rl", "server", str(config), "--number"} <= set(process.info["cmdline"] or ())
        and "megatron_klong" not in str(process.parent()) and process.name() != "srun"
        and process.info["cmdline"][0] != "bash"
    ]  # fmt: skip
    assert len(servers) == 1, output(cluster, job)
    servers[0].kill()
    state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=500)
    said = output(cluster, job)
    assert state == "COMPLETED", said
    assert "server ended with exit code 137; started again" in said and "orchestrator is done" in said
    assert len(json.loads((run / "summary.json").read_text())["iterations"]) == 3
