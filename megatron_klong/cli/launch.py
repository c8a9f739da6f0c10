"""``klong launch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.config import LaunchConfig, load_config


def launch(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/nemo_run/quickstart.yaml.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="[KEY=VALUE|@FILE]...", help="Override settings.")
    ] = [],  # noqa: B006
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the script of every step (on Slurm, the sbatch); start nothing."
        ),
    ] = False,
    again: Annotated[
        list[str], typer.Option(metavar="STEP", help="Do this step again, though it is done.")
    ] = [],  # noqa: B006
) -> None:
    """Run steps that depend on one another as a nemo-run experiment.

    On this machine (executor=local), in containers (executor=docker), or on Slurm (executor=slurm), where all
    are submitted at once and each waits for those it needs. Launched again, steps that are done are left out,
    and those that were cut off go on from their checkpoints. nemo-run has an environment of its own: make
    launch-env.

    Example: .venv-launch/bin/klong launch examples/nemo_run/glm45_air.yaml --dry-run
    """
    from megatron_klong.launch import dry_run as scripts_of
    from megatron_klong.launch import forget, launch

    settings = load_config(LaunchConfig, config, overrides)
    if dry_run:
        for name, text in scripts_of(settings).items():
            print(f"#### {name}\n{text}")
        return
    forget(settings, again)
    ended = launch(settings)
    width = max(len(step.name) for step in ended)
    for step in ended:
        more = f" as job {step.job}" if step.job else ""
        more += f" with exit code {step.exit_code}" if step.exit_code is not None else ""
        more += "" if step.state in ("done before", "not started") else f"; logs in {step.folder}"
        print(f"{step.name:<{width}}  {step.state}{more}")
    if not all(step.well for step in ended):
        raise typer.Exit(1)
