"""Other places that a run logs to: TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_klong.config import WandbConfig


class Sink(Protocol):
    """Takes numbers by name."""

    @property
    def name(self) -> str: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...


@contextmanager
def tensorboard_sink(folder: Path, first_step: int) -> Iterator[Sink]:
    """Event files that TensorBoard reads.

    Args:
        first_step: that this start of the run writes; what an earlier one has written of it and later ones is
            not shown.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(parents=True, exist_ok=True)
    # The name is ours: TensorBoard's has the time in seconds, and two starts in one second would share it.
    writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
    start = SessionLog(status=SessionLog.START)
    writer.write_event(Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2"))
    writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
    try:
        yield _TensorBoard(writer)
    finally:
        writer.close()


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()


@contextmanager
def wandb_sink(
    config: WandbConfig, folder: Path, run_id: str, settings: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Sink]:
    """A run of Weights & Biases, which goes on when this run is started again.

    Where W&B cannot be reached in time, or there is no API key, it logs into ``folder``, for `wandb sync`.

    Args:
        run_id: of this package's run, the same at each start.
        settings: the resolved config, shown with the run.
        say: told of such a fallback.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "dir": str(folder), "project": config.project, "entity": config.entity, "name": config.name,
        "id": run_id, "resume": "allow", "config": dict(settings),
        "settings": wandb.Settings(
            silent=True, console="off", save_code=False, init_timeout=config.timeout_seconds,
            finish_timeout=config.timeout_seconds,
        ),
    }  # fmt: skip
    run = None
    if config.mode == "online":
        try:
            run = wandb.init(mode="online", **options)
        except Exception as error:  # it has many kinds, and none of them is worth a night
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            say(
                f"W&B cannot be reached ({reason}): logging into {folder}/wandb; `wandb sync "
                f"{folder}/wandb/offline-run-*` uploads it"
            )
            wandb.teardown(exit_code=1)  # frees the id, and ends the process that it has started
    if run is None:
        run = wandb.init(mode="offline", **options)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    code = 1
    try:
        yield _Wandb(run)
        code = 0
    finally:
        with contextlib.suppress(Exception):
            run.finish(exit_code=code)
            wandb.teardown(exit_code=code)  # ends the process that has written


class _Wandb:
    name = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # The step is a value of its own: W&B's own counter refuses to go back after a resume.
        numbers = {name: value for name, value in values.items() if math.isfinite(value)}
        self._run.log({"step": step, **numbers})
