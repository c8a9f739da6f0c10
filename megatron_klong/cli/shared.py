"""What the groups of commands share: options, output, a live count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")]
Renderer = Annotated[str, typer.Option(help="Chat format: glm-4.5 or qwen3.")]


def print_json(value: Any) -> None:
    """One line of JSON; records and models inside become objects."""
    print(json.dumps(value, default=_jsonable, ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        # One level at a time, so that models inside records come through here too.
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    raise TypeError(f"{type(value).__name__} is no JSON")


@contextmanager
def counter(doing: str, what: str) -> Iterator[Callable[[], None]]:
    """A live count on a terminal's stderr; silent elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn(f"{doing} {{task.completed:.0f}} {what}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda: bar.advance(task)


@contextmanager
def byte_bar(doing: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes done on a terminal's stderr, with the time left; silent elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def quiet() -> None:
    """Keep what torch and Megatron say of themselves at import from the terminal."""
    from megatron_klong.platform import quiet_imports

    quiet_imports()
