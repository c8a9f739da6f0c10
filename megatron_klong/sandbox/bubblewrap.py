"""Sandboxes by bubblewrap: no network, own processes, own files, limits. For Linux, as root or not.

As root, the sandbox is set up by root and entered by a user of its own, since limits on processes do not
bind root. As another user, bubblewrap makes a user namespace, and the kernel (5.14 or later) counts
processes within it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_klong.config.sandbox import SandboxConfig
from megatron_klong.sandbox.base import ArchiveError, CommandResult, SandboxError, SandboxSpec
from megatron_klong.sandbox.cgroup import MemoryGroup, memory_group, remove_left_groups
from megatron_klong.sandbox.framing import CHUNK, LENGTH, frame, header

WORK = "/work"
"""The working folder inside."""

_INSIDE = "/run/klong"
_ANSWER_SECONDS = 30.0
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ssl/certs")


class Bubblewrap:
    """Makes sandboxes by the ``bwrap`` command.

    Raises:
        ValueError: this machine has no bwrap or no setpriv.
    """

    def __init__(self) -> None:
        for program, package in (("bwrap", "bubblewrap"), ("setpriv", "util-linux"), ("bash", "bash")):
            if shutil.which(program) is None:
                raise ValueError(f"sandbox: this machine has no {program!r} command; install {package}")
        remove_left_groups("klong")
        # Users that nobody is; not the same for two sandboxes, whose processes the kernel counts by user.
        self._users = itertools.count(random.randrange(1 << 20, 1 << 30))

    async def open(self, spec: SandboxSpec) -> BubblewrapSandbox:
        """Make a sandbox; 0.1 s.

        Raises:
            SandboxError: bwrap refused; says what it said.
            ValueError: a folder to show is closed to the sandbox's user.
        """
        _require_open(spec)
        user = next(self._users)
        group = memory_group(f"klong-{os.getpid()}-{user}", spec.limits.memory_mib << 20)
        command = [*_bwrap(spec), *(_as_user(user) if os.getuid() == 0 else ()), *_server(spec.limits)]
        if group is not None:
            command = ["sh", "-c", f'echo $$ > {shlex.quote(str(group.procs))} && exec "$@"', "sh", *command]
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, env={}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # no process, memory or file descriptor left
            if group is not None:
                group.close()
            raise SandboxError(f"sandbox: could not be started: {error}") from error
        sandbox = BubblewrapSandbox(process, group, spec.limits)
        try:
            await sandbox.run("true", spec.limits.command_seconds)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox


class BubblewrapSandbox:
    """See :class:`megatron_klong.sandbox.base.Sandbox`."""

    def __init__(
        self, process: asyncio.subprocess.Process, group: MemoryGroup | None, limits: SandboxConfig
    ) -> None:
        self._process = process
        self._group = group
        self._limits = limits
        self._one_at_a_time = asyncio.Lock()

    @property
    def bounds_total_memory(self) -> bool:
        """Whether memory is bounded for all processes together, and not only for each."""
        return self._group is not None

    async def run(self, command: str, timeout_seconds: float) -> CommandResult:
        timeout = min(timeout_seconds, self._limits.command_seconds)
        async with self._request({"op": "run", "command": command, "timeout": timeout}, timeout):
            fields = await self._read_fields()
            output = await self._read()
        return CommandResult(fields["exit_code"], output.decode(errors="replace"), fields["seconds"])

    async def write_file(self, path: str, content: bytes) -> str | None:
        async with self._request({"op": "write", "path": path}, 0.0):
            self._send(_pieces(content))
            problem: str | None = (await self._read_fields())["problem"]
        return problem

    async def end_processes(self) -> None:
        async with self._request({"op": "end_processes"}, 0.0):
            await self._read_fields()

    async def archive(self, target: Path) -> tuple[str, ...]:
        async with self._request({"op": "archive"}, self._limits.command_seconds):
            with target.open("wb") as file:
                while chunk := await self._read():
                    file.write(chunk)
            return tuple((await self._read_fields())["left_out"])

    async def unpack(self, archive: Path) -> None:
        async with self._request({"op": "unpack"}, self._limits.command_seconds):
            with archive.open("rb") as file:
                self._send(iter(lambda: file.read(CHUNK), b""))
            problem = (await self._read_fields())["problem"]
        if problem is not None:
            raise ArchiveError(f"{archive.name} does not unpack: {problem}")

    async def close(self) -> None:
        self._end()
        await self._process.wait()  # the kernel ends the processes inside with bwrap's own child
        if self._group is not None:
            await asyncio.to_thread(self._group.close)

    @contextlib.asynccontextmanager
    async def _request(self, fields: dict[str, Any], seconds: float) -> Any:
        """Send a request and let the body read its answer; whatever breaks that off ends the sandbox."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(seconds + _ANSWER_SECONDS):
                    self._write(header(fields))
                    yield
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self._end()
                raise SandboxError(f"sandbox: {await self._why(error)}") from error
            except BaseException:
                self._end()  # the rest of the answer would be taken for the next one's
                raise

    def _send(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self._write(frame(chunk))
        self._write(frame(b""))

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.returncode is not None:
            raise BrokenPipeError
        self._process.stdin.write(data)

    async def _read(self) -> bytes:
        assert self._process.stdout is not None
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        return await self._process.stdout.readexactly(length)

    async def _read_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(await self._read())
        return fields

    def _end(self) -> None:
        # Not Process.kill: it would reap the process behind asyncio's back.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _why(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return "it gave no answer in time"
        assert self._process.stderr is not None
        said = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                said = await self._process.stderr.read(4096)
        text = " ".join(said.decode(errors="replace").split())
        return f"it ended: {text}" if text else "it ended; its processes may have been killed from inside"


def check_hidden(field: str, path: Path) -> None:
    """Refuse a path (ValueError) that every sandbox would show: it is not meant for agents."""
    for shown in (Path("/usr"), Path(sys.base_prefix)):
        if path.resolve().is_relative_to(shown.resolve()):
            raise ValueError(
                f"{field}={path}: lies in {shown}, which sandboxes show to agents; choose another place"
            )


def _require_open(spec: SandboxSpec) -> None:
    for folder in spec.read_only.values():
        if os.getuid() == 0 and folder.is_dir() and folder.stat().st_mode & 0o5 != 0o5:
            raise ValueError(
                f"sandbox: {folder} is closed to other users, and the sandbox has a user of its own; "
                f"chmod -R a+rX {folder}"
            )


def _pieces(content: bytes) -> Iterator[bytes]:
    return (content[start : start + CHUNK] for start in range(0, len(content), CHUNK))


def _bwrap(spec: SandboxSpec) -> list[str]:
    size = str(spec.limits.disk_mib << 20)
    shown = {"/usr": Path("/usr"), sys.base_prefix: Path(sys.base_prefix), _INSIDE: Path(__file__).parent}
    if os.getuid() == 0:
        # Kept only until setpriv has changed the user; it drops them.
        alone = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            alone += ["--cap-add", capability]
    else:
        alone = ["--unshare-all"]
    return [
        "bwrap", *alone, "--die-with-parent", "--new-session", "--hostname", "sandbox",
        "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm",
        "--remount-ro", "/dev",
        "--perms", "0777", "--size", size, "--tmpfs", WORK, "--perms", "1777", "--size", size,
        "--tmpfs", "/tmp", *_mounts({**shown, **spec.read_only}), *_system(),
        "--remount-ro", "/", "--chdir", WORK, "--clearenv",
        "--setenv", "PATH", ":".join([*spec.path, "/usr/local/bin", "/usr/bin", "/bin"]),
        *_variables({"HOME": WORK, "LANG": "C.UTF-8", **spec.environment}),
    ]  # fmt: skip


def _variables(values: dict[str, str]) -> Iterator[str]:
    for name, value in values.items():
        yield from ("--setenv", name, value)


def _mounts(shown: dict[str, Path]) -> list[str]:
    """Read-only folders. Those above them are made by hand: bwrap would close them to other users."""
    made: set[str] = {"/usr"}
    arguments: list[str] = []
    for inside, outside in shown.items():
        if inside != "/usr" and inside.startswith("/usr/"):
            continue  # part of what is shown already
        for above in reversed(Path(inside).parents):
            if str(above) not in made and str(above) != "/":
                made.add(str(above))
                arguments += ["--perms", "0755", "--dir", str(above)]
        arguments += ["--ro-bind", str(outside), inside]
    return arguments


def _system() -> list[str]:
    """The folders beside /usr that programs need: links into it, or folders of their own."""
    arguments: list[str] = []
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            arguments += ["--ro-bind", name, name]
    arguments += ["--perms", "0755", "--dir", "/etc"]
    for name in _ETC:
        arguments += ["--ro-bind-try", name, name]
    return arguments


def _as_user(user: int) -> tuple[str, ...]:
    return (
        "setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "--no-new-privs",
        "--bounding-set=-all", "--inh-caps=-all",
    )  # fmt: skip


def _server(limits: SandboxConfig) -> list[str]:
    numbers = {
        "RLIMIT_AS": limits.memory_mib << 20,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
        "output": limits.output_kib << 10,
        "disk": limits.disk_mib << 20,
    }
    python = os.path.realpath(sys.executable)
    return [python, "-I", "-S", f"{_INSIDE}/inside.py", json.dumps(numbers)]
