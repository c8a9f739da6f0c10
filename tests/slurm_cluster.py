"""A real Slurm of a few nodes, all of them this machine, for as long as the tests need it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_min_interval=0
SlurmdTimeout=4
KillWait=30
ReturnToService=2
MpiDefault=none
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=2000
PartitionName=cpu Nodes=ALL Default=YES State=UP
"""


@dataclass
class SlurmCluster:
    """The cluster.

    Attributes:
        root: everything it writes.
        environment: for the commands of Slurm, and whoever uses them.
    """

    root: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(
        self, *command: str | Path, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command of Slurm, to its end."""
        words = [str(part) for part in command]
        everything = {**self.environment, **environment}
        done = subprocess.run(words, env=everything, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *command: str | Path, **environment: str) -> str:
        """The number of a job that ``sbatch`` takes."""
        return self.run("sbatch", "--parsable", *command, **environment).stdout.strip()

    def submit_by_name(self, *command: str | Path) -> str:
        """The same; for the job nodes' names are those of this machine, as a cluster's DNS would have it.

        Where the library for that is missing, it is told the address, as other jobs are. Not for all jobs:
        under the library torch finds no numeric address.
        """
        (library, *_) = (*Path("/usr/lib").glob("*/libnss_wrapper.so"), None)
        if library is None:
            return self.submit(*command)
        hosts, names = self.root / "hosts", " ".join(f"n{number}" for number in range(1, 10))
        hosts.write_text(f"127.0.0.1 {names}\n::1 {names}\n{Path('/etc/hosts').read_text()}")
        by_name = {"LD_PRELOAD": str(library), "NSS_WRAPPER_HOSTS": str(hosts)}
        unset = ("env", "--unset=MASTER_ADDR")
        return self.run(*unset, "sbatch", "--parsable", *command, **by_name).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Of ``scontrol show job``, such as ``JobState`` or ``ExitCode``."""
        shown = self.run("scontrol", "show", "job", "-o", job).stdout.splitlines()[0]
        return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """The state, as soon as it is one of these."""
        end = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < end, f"job {job} is {state}: {self.field(job, 'Reason')}"
            time.sleep(0.3)
        return state

    def kill_node(self, name: str) -> None:
        """End a node's daemon, as if the node were lost."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        spool = self.root / f"spool-{name}"
        spool.mkdir(exist_ok=True)
        _start(self, name, ["slurmd", "-D", "-N", name])


def missing() -> str | None:
    """Why there can be no cluster here, after trying to install what it needs."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    if all(map(shutil.which, needed)):
        return None if os.geteuid() == 0 else "Slurm's daemons need root here"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "needs Slurm (slurm-wlm) and munge, or root and apt-get to install them"
    packages = ["slurm-wlm", "munge", "libnss-wrapper"]
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["apt-get", "update", "-q"], env=environment, capture_output=True, timeout=120)
        done = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "apt-get gets no answer, and so cannot install slurm-wlm"
    return None if done.returncode == 0 else f"apt-get cannot install slurm-wlm: {done.stderr[-300:]}"


@contextmanager
def slurm_cluster(root: Path, nodes: int = 4) -> Iterator[SlurmCluster]:
    """Start munge, the controller and the nodes; stop them at the end, and whatever jobs have left."""
    (root / "state").mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(nodes + 1)
    conf = root / "slurm.conf"
    conf.write_text(
        _CONF.format(host=host, controller=ports[0], root=root, nodes=nodes, first=ports[1], last=ports[-1])
    )
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    cluster = SlurmCluster(root, {**os.environ, "SLURM_CONF": str(conf)})
    try:
        _start_munge(cluster)
        _start(cluster, "slurmctld", ["slurmctld", "-D"])
        for number in range(1, nodes + 1):
            cluster.start_node(f"n{number}")
        _until_idle(cluster, nodes)
        yield cluster
    finally:
        cluster.run("scancel", "--user", "root", check=False)
        end = time.monotonic() + 40  # tasks have KillWait to end
        while cluster.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < end:
            time.sleep(0.3)
        for process in reversed(list(cluster.processes.values())):
            process.send_signal(signal.SIGTERM)
        for process in cluster.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _start_munge(cluster: SlurmCluster) -> None:
    key = cluster.root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = ("socket", "log", "pid", "seed")
    paths = {name: cluster.root / f"munge.{name}" for name in names}
    command = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={paths['socket']}",
        f"--log-file={paths['log']}", f"--pid-file={paths['pid']}", f"--seed-file={paths['seed']}",
    ]  # fmt: skip
    _start(cluster, "munged", command)
    end = time.monotonic() + 20
    while not paths["socket"].exists():
        assert time.monotonic() < end, "munged did not start"
        time.sleep(0.1)


def _start(cluster: SlurmCluster, name: str, command: list[str]) -> None:
    with (cluster.root / f"{name}.out").open("wb") as out:
        cluster.processes[name] = subprocess.Popen(
            command, env=cluster.environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )


def _until_idle(cluster: SlurmCluster, nodes: int) -> None:
    end = time.monotonic() + 60
    while True:
        done = cluster.run("sinfo", "-h", "-N", "-o", "%T", check=False)
        if done.stdout.split().count("idle") == nodes:
            return
        assert time.monotonic() < end, (
            done.stdout + done.stderr + (cluster.root / "slurmctld.out").read_text()
        )
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    """The controller's, and neighbouring ones for the nodes, as Slurm's node ranges want them."""
    for first in range(21000 + os.getpid() % 5000, 32000, count + 1):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")
