"""The sandbox protocol: a place without network where commands of a model may do as they like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_klong.config.sandbox import SandboxConfig


class SandboxError(RuntimeError):
    """The sandbox itself failed or is gone."""


class ArchiveError(Exception):
    """A tar file does not unpack: it is damaged, or too large for the sandbox."""


@dataclass(frozen=True)
class SandboxSpec:
    """What a sandbox is opened with.

    Attributes:
        limits: memory, processes, disk, output, time of one command.
        read_only: folders of this machine to show, by the absolute path they get inside.
        path: folders (inside) that come first in the search for programs.
        environment: variables of commands, beside PATH, HOME (the working folder) and LANG, or instead.
    """

    limits: SandboxConfig
    read_only: Mapping[str, Path] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandResult:
    """What a command did.

    Attributes:
        exit_code: negative for a signal; None when it was ended at its time limit.
        output: stdout and stderr as they came, undecodable bytes replaced, the middle left out where
            it was longer than the limit.
        seconds: how long it ran.
    """

    exit_code: int | None
    output: str
    seconds: float


class Sandbox(Protocol):
    """One sandbox. Calls are answered one after another; all raise :class:`SandboxError`.

    Not promised: protection against faults of the kernel, or a fair share of CPU and disk bandwidth
    between sandboxes.
    """

    async def run(self, command: str, timeout_seconds: float) -> CommandResult:
        """Run a command line by bash in the working folder. What it leaves in the background goes on."""
        ...

    async def write_file(self, path: str, content: bytes) -> str | None:
        """Write a file, folders above it too; what was wrong (such as a full disk), or None."""
        ...

    async def end_processes(self) -> None:
        """End all that commands left running."""
        ...

    async def archive(self, target: Path) -> tuple[str, ...]:
        """End all processes, and write the working folder as a tar file here.

        Returns:
            The first of the names that were left out: what is no file, folder or link, or did not fit into
            a tar file of the disk's size.
        """
        ...

    async def unpack(self, archive: Path) -> None:
        """Put the content of such a tar file into the working folder.

        Raises:
            ArchiveError: it does not unpack.
        """
        ...

    async def close(self) -> None:
        """End everything in it, and forget its files."""
        ...


class SandboxBackend(Protocol):
    """A way of making sandboxes."""

    async def open(self, spec: SandboxSpec) -> Sandbox:
        """Make one.

        Raises:
            SandboxError: it could not be made.
        """
        ...
