"""Trajectories to the formats of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_klong.trajectory.importing import written_when_complete
from megatron_klong.trajectory.interchange.atif import write_atif
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.schema import Trajectory

WRITERS: Mapping[str, Callable[[Trajectory], str]] = MappingProxyType(
    {"openai": write_openai_chat, "atif": write_atif}
)
"""By the name that ``--to`` takes; each gives a record on one line, which its reader reads back as equal."""

_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: ``files`` at ``out``."""

    out: str
    trajectories: int
    files: int


def export_trajectories(
    trajectories: Iterable[Trajectory], to: str, out: Path, on_record: Callable[[], None] = lambda: None
) -> ExportReport:
    """Write trajectories in another format.

    Args:
        trajectories: such as :func:`~megatron_klong.trajectory.importing.read_imported` gives.
        to: a name of :data:`WRITERS`.
        out: a ``.jsonl`` file for one record a line; else a folder for one file each, which is how tools
            for ATIF take them.

    Raises:
        ValueError: an unknown format, or a place that cannot be written.
    """
    if to not in WRITERS:
        raise ValueError(f"--to {to}: there are {', '.join(WRITERS)}")
    write, count = WRITERS[to], 0
    if out.suffix == ".jsonl":
        with written_when_complete(out) as stream:
            for trajectory in trajectories:
                stream.write(write(trajectory) + "\n")
                count += 1
                on_record()
        return ExportReport(str(out), count, 1)
    if to == "openai":
        raise ValueError(f"--out {out}: name a .jsonl file")
    used: set[str] = set()
    for trajectory in trajectories:
        count += 1
        wanted = name = _UNSAFE.sub("_", trajectory.id)[:100] or "trajectory"
        again = 1
        while name.lower() in used:  # some file systems do not tell cases apart
            again += 1
            name = f"{wanted}-{again}"
        used.add(name.lower())
        with written_when_complete(out / f"{name}.trajectory.json") as stream:
            stream.write(write(trajectory) + "\n")
        on_record()
    return ExportReport(str(out), count, count)
