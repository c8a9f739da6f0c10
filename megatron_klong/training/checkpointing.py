"""Checkpoints by Megatron's distributed checkpointing: saved at any layout, complete or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from megatron.core import dist_checkpointing

from megatron_klong.platform.lifetime import to_disk
from megatron_klong.training.appending import told_in_one_line
from megatron_klong.training.background_save import BackgroundSave
from megatron_klong.training.first_rank import on_first
from megatron_klong.training.model_checkpoint import put_model, sharded_model
from megatron_klong.training.moments import allocate_moments
from megatron_klong.training.optimizer_state import owned_tensors, put_optimizer, sharded_optimizer
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.trainer import Trainer

_STEP_DIR = re.compile(r"step_(\d{8})")
_FILE_LIST = "files.json"


class Progress(Protocol):
    """Where a run stands: a dataclass of what is to be known when it goes on.

    Attributes:
        step: optimizer steps done.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int: ...

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """As it was saved."""
        ...


ProgressKind = TypeVar("ProgressKind", bound=Progress)


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay.

    Attributes:
        last: so many of the newest.
        every: beside them those of steps that are a multiple of it; 0 keeps no others.
    """

    last: int
    every: int = 0


def checkpoint_dir(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def resume_checkpoint(root: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a run goes on from, chosen by the first rank for all; None for a new run.

    Damaged ones that are newer are set aside under another name, so that they do not count among those kept.

    Args:
        say: told of them, on the first rank.

    Raises:
        RankError: there are checkpoints, and none is whole.
    """

    def choose() -> str | None:
        newer: list[Path] = []
        for folder in reversed(_named(root)):
            damage = _damage(folder)
            if damage is None:
                for damaged in newer:
                    aside = _set_aside(damaged)
                    say(f"checkpoint {damaged.name} is now {aside}, and may be deleted")
                return str(folder)
            say(f"checkpoint {folder.name} is damaged ({damage}) and is passed over")
            newer.append(folder)
        if newer:
            raise OSError("none of its checkpoints is whole; --fresh deletes the run and starts it anew")
        return None

    try:
        chosen = on_first(choose)
    except OSError as error:
        raise RankError(f"run.dir={root.parent}: {error}") from error
    return None if chosen is None else Path(chosen)


class CheckpointSaver:
    """Saves checkpoints of one run, one at a time; all ranks take part in every call.

    A folder has its final name only when everything is in it, and old ones are deleted only then.

    Args:
        on_bytes: called while a save is waited for, each time that more of it is written.
        say: told of old ones that cannot be deleted, on the first rank.
    """

    def __init__(
        self,
        root: Path,
        kept: Kept,
        on_bytes: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._root = root
        self._kept = kept
        self._on_bytes = on_bytes
        self._say = say
        self._under_way: tuple[BackgroundSave, Path] | None = None

    def start(self, trainer: Trainer, progress: Progress) -> Path:
        """Begin to save model, its config, optimizer, schedule and progress; training may go on.

        Returns:
            The folder that it will be, once :meth:`poll` or :meth:`finish` has seen the end of it.

        Raises:
            RankError: weights are not finite, or an earlier or this checkpoint could not be written.
        """
        self.finish()
        _check_finite(trainer, progress.step)
        final = checkpoint_dir(self._root, progress.step)
        unfinished = _unfinished(final)

        def make_room() -> None:
            for old in self._root.glob(".step_*.unfinished"):
                shutil.rmtree(old)
            unfinished.mkdir(parents=True)
            (unfinished / "config.json").write_bytes(trainer.config_json)

        with told_in_one_line(f"checkpoint {final}"):
            on_first(make_room)
            state = _sharded_state(trainer) | {
                "scheduler": trainer.scheduler.state_dict(),
                "progress": asdict(progress),
            }
            live = chain(
                trainer.model.parameters(), trainer.model.buffers(), owned_tensors(trainer.optimizer)
            )
            self._under_way = BackgroundSave(state, unfinished, live), final
        return final

    def poll(self) -> Path | None:
        """Complete the checkpoint under way if its files are written: its folder, else None."""
        if self._under_way is None or not self._under_way[0].is_written():
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint under way, if there is one, and complete it: its folder."""
        if self._under_way is None:
            return None
        (save, final), self._under_way = self._under_way, None

        def complete() -> None:
            _write_file_list(_unfinished(final))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(_unfinished(final), final)
            to_disk(self._root)
            self._delete_old()

        with told_in_one_line(f"checkpoint {final}"):
            save.finish(self._on_bytes)
            on_first(complete)
        return final

    def _delete_old(self) -> None:
        for folder in _named(self._root)[: -self._kept.last]:
            if not (self._kept.every and _step(folder) % self._kept.every == 0):
                try:
                    shutil.rmtree(folder)
                except OSError as error:  # somebody may be reading it; the next save tries again
                    self._say(f"checkpoint {folder.name} cannot be deleted: {error}")


def save_checkpoint(trainer: Trainer, progress: Progress, root: Path, keep_last: int) -> Path:
    """Save and wait; returns the folder. See :class:`CheckpointSaver`."""
    saver = CheckpointSaver(root, Kept(keep_last))
    final = saver.start(trainer, progress)
    saver.finish()
    return final


def load_checkpoint(trainer: Trainer, folder: Path, kind: type[ProgressKind]) -> ProgressKind:
    """Restore everything that was saved, at this run's layout.

    Args:
        kind: of the progress that was saved.

    Raises:
        RankError: the checkpoint is of another version.
    """
    asked = _sharded_state(trainer)
    optimizer = asked["optimizer"]
    loaded = dist_checkpointing.load(asked, str(folder))
    if "steps" not in loaded["optimizer"]:
        raise RankError(
            f"checkpoint {folder} is of an earlier version, whose optimizer this one cannot read; start "
            f"another run with model.weights={folder}"
        )
    put_model(trainer.model, loaded)
    put_optimizer(trainer.optimizer, optimizer, loaded["optimizer"])
    trainer.scheduler.load_state_dict(loaded["scheduler"])
    return kind.of(loaded["progress"])


def _sharded_state(trainer: Trainer) -> dict[str, Any]:
    model = sharded_model(trainer.model)
    allocate_moments(trainer.optimizer)
    return {**model, "optimizer": sharded_optimizer(trainer.optimizer, model)}


def _check_finite(trainer: Trainer, step: int) -> None:
    """Refuse to save weights that no run can go on from."""
    broken = [not bool(torch.isfinite(weight).all()) for weight in trainer.model.parameters()]
    count = torch.tensor(sum(broken), device=trainer.device)
    torch.distributed.all_reduce(count)
    if count.item():
        raise RankError(
            f"weights are not finite after step {step}, so they are not saved; start again to go on from the "
            "checkpoint before, with a lower optimizer.lr"
        )


def _write_file_list(folder: Path) -> None:
    """Last of all: names and sizes of what must be there, and all of it on the disk."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    for name in sizes:
        if not name.endswith(".distcp"):  # those are on the disk, by whoever wrote them
            to_disk(folder / name)
    with (folder / _FILE_LIST).open("w") as stream:
        json.dump(sizes, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    to_disk(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or has another size."""
    try:
        sizes = json.loads((folder / _FILE_LIST).read_text())
    except (OSError, ValueError):
        return f"{_FILE_LIST} is missing or unreadable"
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def _set_aside(damaged: Path) -> str:
    """Under a name that is none of a checkpoint's; the name."""
    for number in count(1):
        aside = damaged.with_name(f".{damaged.name}.damaged-{number}")
        if not aside.exists():
            damaged.rename(aside)
            return aside.name
    raise AssertionError("numbers do not end")


def _unfinished(final: Path) -> Path:
    return final.with_name(f".{final.name}.unfinished")


def _step(folder: Path) -> int:
    match = _STEP_DIR.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _named(root: Path) -> list[Path]:
    """Checkpoints with their final name, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _STEP_DIR.fullmatch(path.name))
