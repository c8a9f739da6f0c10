"""``klong sft`` and ``klong rl``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.config import RlConfig, SftConfig, load_config
from megatron_klong.platform.lifetime import die_with_parent


def sft(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/quickstart/sft.yaml.")],
    overrides: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = [],  # noqa: B006
    nproc: Annotated[int | None, typer.Option(help="Ranks to start here (parallel.nproc).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in run.dir first.")] = False,
) -> None:
    """Fine-tune on split trajectories; started again, it resumes from the last checkpoint.

    Starts its own ranks on this node; under torchrun it is one rank.

    Example: klong sft examples/quickstart/sft.yaml optimizer.lr=1e-3
    """
    from megatron_klong.training.start import start_sft

    if nproc is not None:
        overrides = [*overrides, f"parallel.nproc={nproc}"]
    raise typer.Exit(start_sft(load_config(SftConfig, config, overrides), fresh=fresh))


def rl(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[trainer|server|orchestrator] CONFIG [KEY=VALUE]...",
            help="YAML file, see examples/quickstart/rl.yaml; settings to override.",
        ),
    ],
    number: Annotated[int, typer.Option(min=0, help="Which of the servers, from 0; with `server`.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in run.dir first.")] = False,
) -> None:
    """Reinforcement learning: rollouts by vLLM in sandboxes, graded, trained on by Megatron.

    Starts trainer, servers and orchestrator here, and starts again those that die. With a role's name
    before CONFIG it is that role alone, as on a cluster; they meet in run.dir. Started again, all go on
    where they were.

    Example: klong rl examples/quickstart/rl.yaml optimizer.lr=1e-3
    """
    if "KLONG_PARENT" in os.environ:
        die_with_parent(int(os.environ.pop("KLONG_PARENT")))
    role = arguments[0] if arguments[0] in ("trainer", "server", "orchestrator") else None
    if role and len(arguments) == 1:
        raise ValueError(f"klong rl {role}: name the CONFIG")
    file, *overrides = arguments[1:] if role else arguments
    config = load_config(RlConfig, Path(file), overrides)
    if role and fresh:
        raise ValueError(f"--fresh is for `klong rl CONFIG`; a {role} joins a run")
    raise typer.Exit(_rl_role(role, config, number, fresh=fresh))


def _rl_role(role: str | None, config: RlConfig, number: int, *, fresh: bool) -> int:
    from megatron_klong.rl import roles
    from megatron_klong.rl.display import terminal_display
    from megatron_klong.rl.supervisor import supervise

    if role == "trainer":
        return roles.run_trainer(config)
    if role == "server":
        return roles.run_server(config, number)
    with terminal_display() as display:
        if role == "orchestrator":
            return roles.run_orchestrator(config, display)
        return supervise(config, fresh=fresh, say=display.say)
