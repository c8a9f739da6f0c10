"""The process that lives inside a sandbox and does what the host asks, one request after another.

Started by a backend as ``python -I -S inside.py LIMITS`` with the requests on stdin and the answers on
stdout. A request is a frame of JSON; file contents follow in frames. It needs Python's standard library
and bash. Commands run as its own user, so they could kill it: the host then sees the sandbox end.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(__file__))  # -I leaves the script's folder out
from framing import CHUNK, LENGTH, frame, header  # type: ignore[import-not-found]

# Every sandbox starts this file: what is imported above is most of the time that takes, so tarfile comes
# where it is used, and these only for the reader and the type checker.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable
    from typing import Any, BinaryIO

_LIBC = ctypes.CDLL(None)
_PR_SET_DUMPABLE = 4
_DRAIN_SECONDS = 0.05
_TAR_ENTRY = 3 * 512  # most of what an entry takes beside its content: header, long name, rounding
_DEEPEST = 64
_NAMED = 20


def main(limits: dict[str, int]) -> None:
    """Answer requests until stdin ends."""
    _LIBC.prctl(_PR_SET_DUMPABLE, 0)  # commands may not look into this process
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    operations: dict[str, Callable[..., None]] = {
        "run": _run, "write": _write, "archive": _archive, "unpack": _unpack, "end_processes": _end_processes,
    }  # fmt: skip
    while (request := _read(requests)) is not None:
        fields = json.loads(request)
        operations[fields.pop("op")](requests, answers, limits, **fields)
        answers.flush()


def _run(
    _requests: BinaryIO, answers: BinaryIO, limits: dict[str, int], command: str, timeout: float
) -> None:
    start = time.monotonic()
    kept = _Kept(limits["output"])
    try:
        exit_code = _watch(_start_with_room(command, limits, kept), kept, start + timeout)
    except (OSError, ValueError) as error:  # such as a command that is too long, or holds a NUL
        kept.add(
            f"[the command could not be started: {getattr(error, 'strerror', None) or error}]\n".encode()
        )
        exit_code = 126
    answers.write(header({"exit_code": exit_code, "seconds": time.monotonic() - start}) + frame(kept.bytes()))


def _start_with_room(command: str, limits: dict[str, int], kept: _Kept) -> subprocess.Popen[bytes]:
    try:
        return _start(command, limits)
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EAGAIN, errno.ENOMEM):
            raise
        # Others than this process hold all that the limits allow: end them, or nothing can run again.
        _kill_all()
        kept.add(b"[the limit of processes was reached; all processes in the sandbox were ended]\n")
        return _start(command, limits)


def _kill_all() -> None:
    """End every process in the sandbox that this one may end, except itself."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return
    time.sleep(_DRAIN_SECONDS)


def _end_processes(_requests: BinaryIO, answers: BinaryIO, _limits: dict[str, int]) -> None:
    _kill_all()
    answers.write(header({}))


def _start(command: str, limits: dict[str, int]) -> subprocess.Popen[bytes]:
    def limit() -> None:
        for kind in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_CORE"):
            resource.setrlimit(getattr(resource, kind), (limits[kind], limits[kind]))
        # When memory runs out, commands go before this process.
        _LIBC.prctl(_PR_SET_DUMPABLE, 1)  # or the file would be root's
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")

    return subprocess.Popen(
        ["/bin/bash", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit,
    )  # fmt: skip


def _watch(process: subprocess.Popen[bytes], kept: _Kept, deadline: float) -> int | None:
    """Read what it prints until it ends; None when that was at the deadline.

    Its end counts, not that of its output: what it leaves in the background may hold that open.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as selector:
        selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, "end")
        selector.register(pipe, selectors.EVENT_READ, "output")
        while process.returncode is None:
            left = deadline - time.monotonic()
            ready = {key.data for key, _ in selector.select(max(0.0, left))}
            if "output" in ready and not _drain(pipe, kept):
                selector.unregister(pipe)
            if "end" in ready:
                process.wait()
            elif left <= 0:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _drain(pipe, kept)
                process.stdout.close()
                return None
        os.close(next(key.fd for key in selector.get_map().values() if key.data == "end"))
    _drain(pipe, kept)
    process.stdout.close()
    return process.returncode


def _drain(pipe: int, kept: _Kept) -> bool:
    """Take what is there, up to a share; whether more may come."""
    for _ in range(64):
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return True
        if not data:
            return False
        kept.add(data)
    return True


class _Kept:
    """Head and tail of an output."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head, self._tail, self._left_out = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        over = len(self._tail) - self._half
        if over > 0:
            self._left_out += over
            del self._tail[:over]

    def bytes(self) -> bytes:
        note = f"\n[{self._left_out} bytes are left out]\n".encode() if self._left_out else b""
        return bytes(self._head) + note + bytes(self._tail)


def _write(requests: BinaryIO, answers: BinaryIO, _limits: dict[str, int], path: str) -> None:
    content = b"".join(_chunks(requests))
    problem: str | None = None
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "not a regular file")
        with open(path, "wb") as file:
            file.write(content)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    answers.write(header({"problem": problem}))


def _archive(_requests: BinaryIO, answers: BinaryIO, limits: dict[str, int]) -> None:
    """The working folder as a tar file that is no larger than the disk, whatever files claim to hold."""
    import tarfile

    _kill_all()  # nothing may change while it is read
    left = limits["disk"] - tarfile.RECORDSIZE  # what ends the file
    left_out: list[str] = []
    waiting = [(name, 1) for name in sorted(os.listdir(), reverse=True)]
    with tarfile.open(fileobj=_Frames(answers), mode="w|") as tar:
        while waiting:
            name, depth = waiting.pop()
            tar.inodes = {}  # type: ignore[attr-defined]  # a second link to a file is a file as well
            try:
                entry = tar.gettarinfo(name)
            except OSError:  # closed to its own user
                entry = None
            if entry is None or not (entry.isreg() or entry.isdir() or entry.issym()):
                left_out.append(name)
                continue
            entry.mtime = int(entry.mtime)  # or every entry would need another one for the fraction
            size = _TAR_ENTRY + (entry.size if entry.isreg() else 0)
            if size > left or depth > _DEEPEST or not _add(tar, entry):
                left_out.append(name)
                continue
            left -= size
            if entry.isdir():
                waiting += [(f"{name}/{each}", depth + 1) for each in _listed(name)]
    answers.write(frame(b"") + header({"left_out": left_out[:_NAMED]}))


def _add(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bool:
    if entry.isreg() and not os.access(entry.name, os.R_OK):
        return False
    if not entry.isreg():
        tar.addfile(entry)
        return True
    with open(entry.name, "rb") as file:
        tar.addfile(entry, file)
    return True


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder), reverse=True)
    except OSError:
        return []


def _unpack(requests: BinaryIO, answers: BinaryIO, _limits: dict[str, int]) -> None:
    import tarfile

    problem = None
    content = io.BytesIO(b"".join(_chunks(requests)))
    # Python before 3.11.4 has no filters; what it would write elsewhere is this sandbox's own as well.
    only_here: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
    try:
        with tarfile.open(fileobj=content) as tar:
            tar.extractall(".", **only_here)
    except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
        problem = str(error)
    answers.write(header({"problem": problem}))


class _Frames(io.RawIOBase):
    """Writes what it is given as frames."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers

    def write(self, data: Any) -> int:
        content = bytes(data)
        for start in range(0, len(content), CHUNK):
            self._answers.write(frame(content[start : start + CHUNK]))
        return len(content)


def _chunks(requests: BinaryIO) -> list[bytes]:
    return list(iter(lambda: _read(requests) or b"", b""))


def _read(requests: BinaryIO) -> bytes | None:
    length = requests.read(LENGTH.size)
    return None if len(length) < LENGTH.size else requests.read(LENGTH.unpack(length)[0])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
