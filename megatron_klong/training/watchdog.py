"""A rank that hangs is found by the others, named, and the run ended.

Every rank writes what it is doing into a small file of the run directory, again and again, from a thread of
its own. When its work has not moved for the configured time, it reads the files of all ranks twice: a rank
whose file does not change is gone or stopped; else it is one that is not waiting for others, or the one
that is furthest behind. No clocks of different machines are compared.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_klong.training.rank_entry import report_error
from megatron_klong.training.run_directory import replace_text

_BEATS_PER_LIMIT = 8
_SLOWEST_BEAT = 15.0
_COLLECTIVES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
_FRAMES = 3
_USER_ERROR = 2


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: counts the beats.
        step: that it is in.
        phase: of the step.
        moves: how often its work has moved on since it started.
        waits: whether it is in a collective operation.
        where: the innermost of this package's functions that its main thread is in.
    """

    number: int
    step: int
    phase: str
    moves: int
    waits: bool
    where: str


class Watchdog:
    """The thread of one rank.

    Args:
        folder: that all ranks share.
        limit: seconds without a move that are a hang.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit: float) -> None:
        self._folder = folder
        self._rank = rank
        self._ranks = ranks
        self._limit = limit
        self._interval = min(limit / _BEATS_PER_LIMIT, _SLOWEST_BEAT)
        self._main = threading.main_thread().ident
        self._moves = 0
        self._step = 0
        self._phase = "start"
        self._ended = threading.Event()
        self._verdict = folder / "verdict.txt"

    def move(self, phase: str | None = None, step: int | None = None) -> None:
        """The main thread has got on: to a phase of a step, or by a row within it."""
        self._moves += 1
        self._phase = phase or self._phase
        self._step = self._step if step is None else step

    def begin(self) -> None:
        """The first beat, before any work: a rank that stops at once has been heard of."""
        self._write(1)

    def run(self) -> None:
        """The thread: until :meth:`end`, or until a hang, which ends the process."""
        seen, since, number = -1, time.monotonic(), 1
        while not self._ended.wait(self._interval):
            number += 1
            self._write(number)
            if self._moves != seen:
                seen, since = self._moves, time.monotonic()
            elif time.monotonic() - since > self._limit:
                number += 1
                self._give_up(number)
                since = time.monotonic()  # it was none

    def end(self) -> None:
        """No more beats."""
        self._ended.set()

    def _give_up(self, number: int) -> None:
        """End the process, unless any rank moves: then others wait for work that is slow."""
        first = self._read()
        time.sleep(3 * self._interval)
        self._write(number)
        second = self._read()
        if self._ended.is_set() or any(_moved(first, second, rank) for rank in second):
            return
        try:
            faulthandler.dump_traceback(file=sys.stderr)
            report_error(self._agreed(self._explain(first, second)))
        finally:
            os._exit(_USER_ERROR)

    def _agreed(self, found: str) -> str:
        """What the first rank has found: to the others its end may look like another hang."""
        try:
            with self._verdict.open("x") as stream:
                stream.write(found)
        except FileExistsError:
            with suppress(OSError):
                return self._verdict.read_text() or found
        except OSError:  # it can be why ranks hang
            pass
        return found

    def _explain(self, first: dict[int, Beat], second: dict[int, Beat]) -> str:
        limit = f"no progress for training.hang_seconds={self._limit:g}"
        if self._rank not in second:
            return f"{limit}, and no heartbeat can be written to {self._folder}"
        still = [rank for rank in range(self._ranks) if rank != self._rank and _same(first, second, rank)]
        if still:
            said = "; ".join(f"rank {rank} ({_told(second.get(rank))})" for rank in still)
            return f"{limit}: no sign of life from {said}. It is stopped, or its machine is gone or stuck"
        hung = culprits(second)
        if not hung:
            here = _told(second[self._rank])
            doing = "wait for one another" if second[self._rank].waits else "are busy with the same"
            return f"{limit}: all ranks {doing} ({here}); their stacks are in their logs"
        said = "; ".join(f"rank {rank} ({_told(second[rank])})" for rank in hung)
        return f"{limit}: {said} hangs, and the others wait for it; its stack is in its log"

    def _write(self, number: int) -> None:
        frames = _frames(sys._current_frames().get(self._main or 0))
        waits = any(part in frame.f_code.co_filename for frame in frames[:_FRAMES] for part in _COLLECTIVES)
        beat = Beat(number, self._step, self._phase, self._moves, waits, _where(frames))
        try:
            replace_text(self._file(self._rank), json.dumps(asdict(beat)))
        except OSError as error:  # a full disk is said by those who write what matters
            with suppress(OSError):
                print(f"warning: heartbeat: {error}", file=sys.stderr, flush=True)

    def _read(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self._ranks):
            try:
                beats[rank] = Beat(**json.loads(self._file(rank).read_text()))
            except (OSError, ValueError, TypeError):
                continue
        return beats

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.json"


def culprits(beats: dict[int, Beat]) -> list[int]:
    """Of ranks that live and do not get on: those that the others wait for. Empty where none stands out."""
    working = [rank for rank, beat in beats.items() if not beat.waits]
    if 0 < len(working) < len(beats) or len(beats) == 1:
        return working or list(beats)
    behind = min(beat.step for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.step == behind]
    return late if len(late) < len(beats) else []


@contextmanager
def watched(folder: Path, rank: int, ranks: int, limit: float) -> Iterator[Watchdog]:
    """Within, the main thread must move at least once in ``limit`` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / "verdict.txt").unlink(missing_ok=True)
    watchdog = Watchdog(folder, rank, ranks, limit)
    watchdog.begin()
    thread = threading.Thread(target=watchdog.run, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.end()
        thread.join()


def _moved(first: dict[int, Beat], second: dict[int, Beat], rank: int) -> bool:
    return rank in first and first[rank].moves != second[rank].moves


def _same(first: dict[int, Beat], second: dict[int, Beat], rank: int) -> bool:
    return rank not in second or (rank in first and first[rank].number == second[rank].number)


def _told(beat: Beat | None) -> str:
    return "it has never been heard" if beat is None else f"step {beat.step}, {beat.phase}, in {beat.where}"


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames


def _where(frames: list[FrameType]) -> str:
    """The innermost frame of this package, or of all where there is none."""
    package = str(Path(__file__).parents[1])
    own = [frame for frame in frames if frame.f_code.co_filename.startswith(package)] or frames
    if not own:
        return "nothing"
    code = own[0].f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{own[0].f_lineno})"
