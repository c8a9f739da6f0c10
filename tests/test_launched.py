"""Ranks that others start: what torchrun and srun say of them, and a run that srun has started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.config import ServerConfig
from megatron_klong.platform.cuda import own_device
from megatron_klong.platform.lifetime import on_stop_signals
from megatron_klong.platform.memory import cgroup_limits
from megatron_klong.rl.roles import server_devices
from megatron_klong.training.launched import first_node, nodes, rank_environment
from tests.test_sft import ROOT, arguments, losses, sft

SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "h100-[003-004]",
}  # fmt: skip


def test_torchrun_is_taken_at_its_word() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    assert rank_environment({**given, "HOME": "/", **SRUN}) == given


def test_srun_is_translated() -> None:
    assert rank_environment(SRUN) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "h100-003", "MASTER_PORT": "16234",
    }  # fmt: skip
    assert rank_environment({**SRUN, "MASTER_ADDR": "mine"}) == {
        **rank_environment(SRUN),
        "MASTER_ADDR": "mine",
    }
    one_node = rank_environment({**SRUN, "SLURM_STEP_NUM_NODES": "1"})
    assert one_node is not None and one_node["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_and_a_plain_shell_start_their_own_ranks() -> None:
    assert rank_environment({}) is None
    assert rank_environment({"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    assert rank_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty


def test_a_rank_has_a_gpu_of_its_own_or_is_refused() -> None:
    assert own_device({}, 1) == 0
    assert own_device({"LOCAL_RANK": "3"}, 4) == 3
    assert own_device({"LOCAL_RANK": "3"}, 1) == 0  # srun shows each its own
    for environment, devices in (
        ({"LOCAL_RANK": "4"}, 4),
        ({"LOCAL_RANK": "1", "KLONG_LAUNCHER": "7"}, 1),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1),
    ):
        with pytest.raises(ValueError, match=f"which has {devices} GPUs: start as many ranks"):
            own_device(environment, devices)


def test_a_share_of_a_machines_memory_is_seen(tmp_path: Path) -> None:
    """Slurm limits a job in folders below the root, by version 2 of cgroups or by version 1."""
    job = tmp_path / "system.slice" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "memory.max").write_text("4096\n")
    (job / "step_0" / "memory.max").write_text("max\n")
    assert cgroup_limits("0::/system.slice/job_7/step_0\n", tmp_path) == [4096]
    (tmp_path / "memory" / "slurm").mkdir(parents=True)
    (tmp_path / "memory" / "slurm" / "memory.limit_in_bytes").write_text("2048")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9999")
    own = "5:cpu,cpuacct:/other\n4:memory:/slurm/job_7\n"
    assert cgroup_limits(own, tmp_path) == [2048, 9999]


@pytest.mark.parametrize(
    ("said", "tasks"),
    [
        ({"SLURM_NTASKS_HET_GROUP_2": "6"}, "6"),
        ({"SLURM_JOB_NUM_NODES_HET_GROUP_2": "3", "SLURM_NTASKS_PER_NODE_HET_GROUP_2": "2"}, "6"),
        ({"SLURM_JOB_NUM_NODES_HET_GROUP_2": "3"}, "error: component 2: Slurm does not say how many tasks"),
    ],
)
def test_tasks_of_a_component(said: dict[str, str], tasks: str) -> None:
    """From 23.02 on Slurm no longer says the number itself where only those of a node are asked for."""
    job = {"KLONG_HOME": str(ROOT), "SLURM_SUBMIT_DIR": "/x", "SLURM_JOB_NAME": "n", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-euc", 'source "$KLONG_HOME/slurm/common.sh"; tasks_of 2'],
        env={"PATH": os.environ["PATH"], **job, **said}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout + done.stderr).startswith(tasks), done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("node7,node9", "node7"), ("h100-[003-007,012]", "h100-003"),
        ("gpu[9,11]", "gpu9"), ("rack[1-2]-a,b", "rack1-a"), ("a,b[1-2]", "a"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_list_of_no_node_is_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST='' names no node; set MASTER_ADDR"):
        first_node("")


def test_ranks_of_srun_train_like_our_own(domain_store: Path, tmp_path: Path) -> None:
    """The environment that srun gives its tasks, on one node"""
    layout = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments(domain_store, theirs, *layout)[1:]],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **environment, **SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=280) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 ranks: TP1 CP1 PP1 EP2 DP2" in said[0][0] and said[1][0] == ""
    sft(domain_store, ours, *layout)
    assert losses(theirs) == losses(ours)


@pytest.mark.parametrize(
    ("devices", "number", "environment", "expected"),
    [
        (None, 3, {}, None),
        ("0,1", 3, {}, "0,1"),  # on a machine of its own
        ("4,5,6,7", 1, {}, "6,7"),
        (None, 5, {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "2,3"),
        (None, 5, {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "0,1"),
        (None, 4, {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        (None, 5, {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}, "2,3"),
        (None, 1, {"SLURM_LOCALID": "0"}, None),  # a batch script's, before srun
    ],
)
def test_servers_of_a_machine_share_its_gpus(
    devices: str | None, number: int, environment: dict[str, str], expected: str | None
) -> None:
    config = ServerConfig(
        model=Path("m"), max_model_len=64, tensor_parallel=2, transfer="nccl", devices=devices
    )
    assert server_devices(config, number, environment) == expected


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup; the others are handled, and what was before comes back."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(lambda number, _frame: heard.append(number)) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert set(caught) == {signal.SIGINT, signal.SIGTERM}
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_too_few_gpus_for_the_servers_of_a_machine() -> None:
    config = ServerConfig(
        model=Path("m"), max_model_len=64, tensor_parallel=2, transfer="nccl", devices="0,1,2"
    )
    with pytest.raises(ValueError, match=r"server 1: 3 GPUs \(0,1,2\) are too few for 2 servers"):
        server_devices(config, 1, {})


@pytest.mark.parametrize(
    ("environment", "machines"),
    [
        ({}, 1),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "16"}, 1),
        (SRUN | {"SLURM_STEP_NUM_NODES": "3"}, 3),
    ],
)
def test_machines_of_a_launch(environment: dict[str, str], machines: int) -> None:
    assert nodes(environment) == machines
