"""The processes of a run, each started alone, as on a cluster: trainer, server, orchestrator.

All take the same config and meet in the run directory. Each ends with exit code 0 when the run has finished,
and with 1 for what another start may mend; a user's error is raised. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType

from megatron_klong.config import RlConfig, ServerConfig
from megatron_klong.inference.server import VllmServer
from megatron_klong.inference.wire import ServerError
from megatron_klong.rl.exchange import Exchange, Finished, ServerAddress
from megatron_klong.rl.prepare import check_rl, check_trainer, claim_run
from megatron_klong.rl.report import Display
from megatron_klong.training.launched import nodes, rank_environment
from megatron_klong.training.local_ranks import run_ranks
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory

_POLL_SECONDS = 0.5
_LOCK_SECONDS = 60.0
"""A role of before may be on its way out: vLLM takes its time."""


def run_trainer(config: RlConfig) -> int:
    """Train on this node's ranks, or as one rank of torchrun or srun; the exit code."""
    rank = rank_environment(os.environ)
    ranks = config.parallel.world_size if rank is None else int(rank["WORLD_SIZE"])
    check_trainer(config, ranks, ranks // nodes(os.environ))
    if rank is None:
        run = _join(config)
        with run.locked("trainer", wait_seconds=_LOCK_SECONDS):
            return run_ranks(
                "megatron_klong.rl.worker", [str(run.path)], config.parallel.world_size, run.logs / "trainer"
            )
    os.environ.update(rank)
    with contextlib.ExitStack() as held:
        if rank["RANK"] == "0":  # one looks at the tasks and claims the run for a thousand
            held.enter_context(_join(config).locked("trainer", wait_seconds=_LOCK_SECONDS))
        return _train_here(config)


def _train_here(config: RlConfig) -> int:
    """Train as the rank that this process is; the exit code."""
    from megatron_klong.rl.worker import train

    try:
        train(config)
    except RankError as error:
        raise ValueError(str(error)) from error
    except OSError as error:  # of a file system that may be back
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run_server(config: RlConfig, number: int) -> int:
    """Serve until the run has finished, or a signal asks for the end; the exit code."""
    run = _join(config)
    if number >= config.servers:
        raise ValueError(f"--number {number}: the config has servers={config.servers}, from 0")
    exchange = Exchange(run.exchange)
    devices = server_devices(config.server, number, os.environ)
    settings = config.server.model_copy(update={"devices": devices})

    def serve() -> None:
        with VllmServer(settings, run.logs / f"vllm-{number}.log") as server:
            stay_until_finished(exchange, number, server)

    with run.locked(f"server-{number}", wait_seconds=_LOCK_SECONDS):
        return _exit_code(serve)


def stay_until_finished(exchange: Exchange, number: int, server: VllmServer) -> None:
    """Say where a server listens, and watch it.

    Raises:
        ServerError: it has died, or is to be started again.
    """
    address = ServerAddress(url=server.url, start=secrets.token_hex(4))
    exchange.tell(f"server-{number}", address)
    while exchange.heard("finished", Finished) is None:
        server.check()
        if exchange.heard(f"restart-{number}", ServerAddress) == address:
            raise ServerError(f"{server.url}: an update of its weights broke off, which vLLM cannot give up")
        time.sleep(_POLL_SECONDS)


def server_devices(config: ServerConfig, number: int, environment: Mapping[str, str]) -> str | None:
    """The GPUs of one server, where several are on a machine: ``tensor_parallel`` each, in order.

    Args:
        number: of the server. Under srun its place on the node counts; elsewhere ``server.devices`` are the
            machine's and shared out, if they are more than one server's.

    Raises:
        ValueError: there are too few.
    """
    width, place, listed = config.tensor_parallel, number, config.devices
    if {"SLURM_STEP_ID", "SLURM_LOCALID"} <= environment.keys():
        place = int(environment["SLURM_LOCALID"])
        listed = listed or environment.get("CUDA_VISIBLE_DEVICES")
        if listed is None and place:
            listed = ",".join(map(str, range((place + 1) * width)))
    devices = listed.split(",") if listed else []
    if len(devices) <= width:
        return config.devices
    share = devices[place * width : (place + 1) * width]
    if len(share) < width:
        raise ValueError(
            f"server {number}: {len(devices)} GPUs ({listed}) are too few for {place + 1} servers of "
            f"server.tensor_parallel={width}; start fewer on a machine"
        )
    return ",".join(share)


def run_orchestrator(config: RlConfig, display: Display) -> int:
    """Roll out and hand over until all stages are done; the exit code."""
    from megatron_klong.rl.orchestrator import orchestrate

    run = _join(config)
    if Exchange(run.exchange).heard("finished", Finished) is not None:
        display.say(f"this run has finished: {run.summary}")
        return 0
    with run.locked("orchestrator", wait_seconds=_LOCK_SECONDS):
        return _exit_code(lambda: asyncio.run(orchestrate(config, display)))


def _join(config: RlConfig) -> RunDirectory:
    checked = check_rl(config)
    run = RunDirectory(config.run.dir)
    claim_run(run, config, checked, fresh=False, role=True)
    return run


def _exit_code(work: Callable[[], None]) -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    try:
        work()
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    except (OSError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
