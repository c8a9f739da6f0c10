"""Lines on stdout, and on a terminal a live line below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class TerminalDisplay:
    """See :class:`megatron_klong.rl.report.Display`."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console

    def say(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    @contextmanager
    def phase(self, what: str, total: int | None) -> Iterator[Callable[[], None]]:
        task = self._progress.add_task(what, total=total)
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)


@contextmanager
def terminal_display() -> Iterator[TerminalDisplay]:
    """A display on this process's terminal, or plain lines where it has none."""
    console = Console()
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield TerminalDisplay(progress, console)
