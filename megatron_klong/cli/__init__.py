"""The ``klong`` command. Thin: it parses, calls one function, and prints."""

from __future__ import annotations

import sys

import typer

from megatron_klong.cli import checks, convert, data, factory, launch, model, plan, train
from megatron_klong.inference.wire import ServerError

app = typer.Typer(
    help="A training stack for agents that work for hours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(convert.app, name="convert")
app.add_typer(factory.app, name="factory")
for command in (train.sft, train.rl, plan.plan, launch.launch, checks.sync_check, checks.gpu_check):
    app.command()(command)


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
