"""``klong factory``: tasks and the trajectories of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.cli.shared import AsJson, Renderer, counter, print_json

app = typer.Typer(help="Tasks and expert trajectories.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `generate` a command of its own while it is the only one."""


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tasks: Annotated[int, typer.Option(help="How many tasks.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the tasks.")] = 0,
    min_experiments: Annotated[int, typer.Option(help="Fewest experiments of a task.")] = 30,
    max_experiments: Annotated[int, typer.Option(help="Most experiments of a task.")] = 50,
    hurried: Annotated[
        float, typer.Option(help="Share of the trajectories whose expert hands in early.")
    ] = 0.0,
    renderer: Renderer = "glm-4.5",
    as_json: AsJson = False,
) -> None:
    """Generate replication tasks (paper, rubric), an expert's trajectories and their tokenizer.

    Example: klong factory generate --tasks 200 --out runs/domain
    """
    from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
    from megatron_klong.factory.generate import generate_domain

    with counter("generating", "tasks") as tick:
        report = generate_domain(
            out, count=tasks, seed=seed, renderer=renderer,
            inserted_texts=(MARKER_TEXT, NOTE_TEXT), experiments=(min_experiments, max_experiments),
            hurried=hurried, on_task=tick,
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    print(
        f"{report.count} tasks, {report.messages} messages of the expert (mean grade "
        f"{report.mean_grade:.2f}), tokenizer of {report.vocab_size} tokens -> {out}"
    )
