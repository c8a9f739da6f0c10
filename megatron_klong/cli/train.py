"""``klong sft`` and ``klong rl``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.cli.shared import AsJson, print_json
from megatron_klong.config import RlConfig, SftConfig, load_config
from megatron_klong.platform import import_megatron
from megatron_klong.platform.lifetime import die_with_parent


def sft(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/quickstart/sft.yaml.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="[KEY=VALUE|@FILE]...", help="Override settings.")
    ] = [],  # noqa: B006
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to start here (parallel.nproc). Default: the layout's fewest.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in run.dir first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would be; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on split trajectories; started again, it resumes from the last checkpoint.

    Starts its own ranks on this node; under torchrun or srun it is one rank. SIGTERM or Ctrl-C ends it after
    the present step, with a checkpoint. With --dry-run it needs neither GPUs nor ranks: --nproc says of how
    many ranks the run would be.

    Example: klong sft examples/quickstart/sft.yaml optimizer.lr=1e-3
    """
    if nproc is not None:
        overrides = [*overrides, f"parallel.nproc={nproc}"]
    settings = load_config(SftConfig, config, overrides)
    if dry_run:
        _show_plan(settings, as_json=as_json)
        return
    if as_json:
        raise ValueError("--json is for --dry-run; a run writes metrics.jsonl")
    from megatron_klong.training.start import start_sft

    raise typer.Exit(start_sft(settings, fresh=fresh))


def _show_plan(config: SftConfig, *, as_json: bool) -> None:
    # The CPU stands for every device, also where there are GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import_megatron()
    from megatron_klong.training.dry_run import plan_sft
    from megatron_klong.training.preflight import check_sft

    check_sft(config)
    plan = plan_sft(config)
    if as_json:
        print_json(plan)
        return
    counts = plan.parameters
    prediction = f", and {counts.prediction:,} of prediction layers" if counts.prediction else ""
    print(f"model       {counts.total:,} parameters, {counts.active:,} active{prediction}")
    print(f"layout      {plan.layout}")
    for number, place in enumerate(plan.pipeline):
        print(f"  pipeline {number}  {place.parameters:,} parameters on each rank (rank {place.rank} and on)")
    for source in plan.sources:
        print(
            f"source      {source.name}: {source.train_windows:,} windows of {source.train_tokens:,} tokens, "
            f"{source.held_out_windows:,} held out"
        )
    for phase in plan.phases:
        last = phase.first_step + phase.steps - 1
        print(
            f"phase       {phase.name}: steps {phase.first_step:,} to {last:,}, about {phase.tokens:,} tokens"
        )
    print(
        f"step        {plan.rows_per_step:,} rows of {plan.row_tokens:,} tokens, {plan.micro_batches:,} on "
        "each data-parallel rank"
    )
    print(f"checkpoint  {plan.checkpoint_bytes / 1e9:,.3f} GB; all at a time {plan.disk_bytes / 1e9:,.3f} GB")


def rl(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[trainer|server|orchestrator] CONFIG [KEY=VALUE|@FILE]...",
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
