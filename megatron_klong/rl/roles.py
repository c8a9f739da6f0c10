"""The processes of a run, each started alone, as on a cluster: trainer, server, orchestrator.

All take the same config and meet in the run directory. Imports no torch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from types import FrameType

from megatron_klong.config import RlConfig
from megatron_klong.inference.server import VllmServer
from megatron_klong.inference.wire import ServerError
from megatron_klong.rl.exchange import Exchange, Finished, ServerAddress
from megatron_klong.rl.prepare import prepare_run
from megatron_klong.rl.report import Display
from megatron_klong.training.local_ranks import run_ranks

_POLL_SECONDS = 0.5


def run_trainer(config: RlConfig) -> int:
    """Train on this node's ranks, or as one rank of torchrun; the exit code."""
    run = prepare_run(config)
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        with run.locked("trainer"):
            return run_ranks(
                "megatron_klong.rl.worker", [str(run.path)], config.parallel.world_size, run.logs / "trainer"
            )
    from megatron_klong.rl.worker import train

    config.parallel.check(int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] != "0":
        train(config)
        return 0
    with run.locked("trainer"):
        train(config)
    return 0


def run_server(config: RlConfig, number: int) -> int:
    """Serve until the run has finished, or a signal asks for the end; the exit code, 1 when vLLM ended."""
    run = prepare_run(config)
    exchange = Exchange(run.exchange)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    with run.locked(f"server-{number}"):
        try:
            with VllmServer(config.server, run.logs / f"vllm-{number}.log") as server:
                exchange.tell(f"server-{number}", ServerAddress(url=server.url))
                while exchange.heard("finished", Finished) is None:
                    server.check()
                    time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            return 128 + signal.SIGTERM
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def run_orchestrator(config: RlConfig, display: Display) -> int:
    """Roll out and hand over until all stages are done; the exit code."""
    from megatron_klong.rl.orchestrator import orchestrate

    run = prepare_run(config)
    signal.signal(signal.SIGTERM, _interrupt)
    with run.locked("orchestrator"):
        try:
            asyncio.run(orchestrate(config, display))
        except KeyboardInterrupt:
            return 128 + signal.SIGTERM
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
