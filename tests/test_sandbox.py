"""Bubblewrap for real: what is inside stays inside, and every limit binds."""

from __future__ import annotations

import asyncio
import os
import socket
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from megatron_klong.config import SandboxConfig
from megatron_klong.sandbox.base import ArchiveError, CommandResult, SandboxError, SandboxSpec
from megatron_klong.sandbox.bubblewrap import Bubblewrap, BubblewrapSandbox

LIMITS = SandboxConfig(memory_mib=128, processes=20, disk_mib=2, output_kib=8, command_seconds=20)
Result = TypeVar("Result")


def inside(work: Callable[[BubblewrapSandbox], Awaitable[Result]], spec: SandboxSpec | None = None) -> Result:
    """Do something with a fresh sandbox."""

    async def with_sandbox() -> Result:
        sandbox = await Bubblewrap().open(spec or SandboxSpec(LIMITS))
        try:
            return await work(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(with_sandbox())


def run(*commands: str, timeout: float = 20.0, spec: SandboxSpec | None = None) -> list[CommandResult]:
    async def work(sandbox: BubblewrapSandbox) -> list[CommandResult]:
        return [await sandbox.run(command, timeout) for command in commands]

    return inside(work, spec)


def test_commands_share_a_working_folder_and_nothing_else() -> None:
    first, second, third = run("echo hi > a; cd /tmp; pwd; exit 3", "cat a; pwd", "echo out; echo err >&2")
    assert (first.exit_code, first.output) == (3, "/tmp\n")
    assert (second.exit_code, second.output) == (0, "hi\n/work\n")
    assert third.output == "out\nerr\n"


def test_no_network_and_nothing_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    probe = "import socket; socket.create_connection(('127.0.0.1', {}), 2)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        results = run(
            f"python3 -c \"{probe.format(port)}\"",
            f"cat {tmp_path}/secret", "cat /etc/shadow /etc/passwd", f"ls {Path.home()}/.ssh",
            "cat /proc/net/dev | tail -n +3 | cut -d: -f1", "echo x > /usr/bin/evil", "ps -e | wc -l", "env",
        )  # fmt: skip
    network, secret, shadow, home, devices, usr, processes, environment = results
    assert network.exit_code != 0 and "refused" in network.output.lower()
    assert secret.exit_code and shadow.exit_code and home.exit_code and usr.exit_code
    assert devices.output.split() in ([], ["lo"])
    assert int(processes.output) < 8  # not those of this machine
    assert all(line.split("=")[0] in {"PATH", "HOME", "LANG", "PWD", "SHLVL", "_"}
               for line in environment.output.splitlines())  # fmt: skip


def test_commands_are_not_root_and_cannot_become_it() -> None:
    (who,) = run("id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status")
    user, caps, privileges = who.output.split("\n")[:3]
    if os.getuid() == 0:
        assert int(user) > 65534
    assert int(caps.split()[1], 16) == 0
    assert privileges.split()[1] == "1"


def test_read_only_folders_are_shown_where_asked(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hello").write_text("#!/bin/sh\necho hello $1\n")
    (tmp_path / "bin" / "hello").chmod(0o755)
    tmp_path.chmod(0o755)
    spec = SandboxSpec(LIMITS, {"/task/deep": tmp_path}, ("/task/deep/bin",))
    hello, write = run("hello you", "echo x > /task/deep/new", spec=spec)
    assert hello.output == "hello you\n"
    assert write.exit_code and not (tmp_path / "new").exists()


def test_processes_are_limited_and_the_sandbox_survives() -> None:
    bomb, after = run("for i in $(seq 60); do sleep 100 & done; wait", "echo alive", timeout=3)
    assert bomb.exit_code is None
    assert "Resource temporarily unavailable" in bomb.output
    assert after.exit_code == 0 and after.output.endswith("alive\n")


def test_processes_that_left_their_session_are_counted_too() -> None:
    escape = "for i in $(seq 60); do setsid sleep 100 & done 2>/dev/null; sleep 100"
    results = run(escape, "echo alive", "echo again", timeout=3)
    assert results[0].exit_code is None
    # The first of these finds no process free and has all others ended.
    assert results[1].output.endswith("alive\n") and results[2].output == "again\n"


def test_memory_of_one_process_and_of_all_together() -> None:
    async def work(sandbox: BubblewrapSandbox) -> tuple[list[CommandResult], bool]:
        hog = "python3 -c 'x = bytearray({} << 20); import time; time.sleep({}); print(len(x))'"
        several = " & ".join([hog.format(50, 2)] * 5)
        commands = [hog.format(20, 0), hog.format(300, 0), f"({several}; wait)", "echo alive"]
        return [await sandbox.run(command, 20) for command in commands], sandbox.bounds_total_memory

    (small, large, together, after), total = inside(work)
    assert small.output == f"{20 << 20}\n"
    assert "MemoryError" in large.output
    if total:  # five of 50 MiB under a limit of 128 MiB: some are ended
        assert together.output.count(f"{50 << 20}") < 3
    assert after.output == "alive\n"


def test_disk_is_limited() -> None:
    fill, room, after = run(
        "dd if=/dev/zero of=big bs=1M count=10; dd if=/dev/zero of=/tmp/big bs=1M count=10",
        "du -sk /work /tmp | cut -f1", "rm big; echo x > y && cat y",
    )  # fmt: skip
    assert fill.output.count("No space left on device") == 2
    assert all(int(size) <= 2048 for size in room.output.split())
    assert after.output == "x\n"


def test_time_output_and_bytes_that_are_no_text() -> None:
    slow, loud, odd, left = run(
        "echo begun; sleep 100", "seq 100000", r"printf '\xff\xfe'", "sleep 100 & echo back", timeout=1.5
    )
    assert slow.exit_code is None and slow.output == "begun\n" and 1.4 < slow.seconds < 10
    assert loud.output.startswith("1\n2\n") and loud.output.endswith("\n100000\n")
    assert "bytes are left out" in loud.output and len(loud.output) < (8 << 10) + 100
    assert odd.output == "��"
    assert left.exit_code == 0 and left.seconds < 1.4  # what goes on in the background does not hold it


def test_files_are_written_or_said_why_not() -> None:
    async def work(sandbox: BubblewrapSandbox) -> list[str | None]:
        said = [await sandbox.write_file("deep/er/file", b"x" * 100)]
        said.append(await sandbox.write_file("large", b"x" * (5 << 20)))
        said.append(await sandbox.write_file("deep", b"x"))
        said.append(await sandbox.write_file("/usr/bin/x", b"x"))
        said.append(await sandbox.write_file("a\0b", b"x"))
        await sandbox.run("mkfifo pipe", 5)
        said.append(await sandbox.write_file("pipe", b"x"))
        assert (await sandbox.run("wc -c < deep/er/file", 5)).output == "100\n"
        return said

    fine, *wrong = inside(work)
    assert fine is None and all(wrong)
    assert "No space left" in str(wrong[0])


def test_the_working_folder_moves_to_another_sandbox(tmp_path: Path) -> None:
    async def work(sandbox: BubblewrapSandbox) -> tuple[str, ...]:
        await sandbox.run(
            "mkdir d; echo x > d/f; ln -s /etc/passwd link; mkfifo pipe; truncate -s 1T holes; echo y > g; "
            "ln g hard", 5
        )  # fmt: skip
        return await sandbox.archive(tmp_path / "work.tar")

    assert inside(work) == ("holes", "pipe")
    with tarfile.open(tmp_path / "work.tar") as tar:
        assert sorted(tar.getnames()) == ["d", "d/f", "g", "hard", "link"]

    async def unpack(sandbox: BubblewrapSandbox) -> str:
        await sandbox.unpack(tmp_path / "work.tar")
        return (await sandbox.run("cat d/f g hard", 5)).output

    assert inside(unpack) == "x\ny\ny\n"


def test_an_archive_is_never_larger_than_the_disk(tmp_path: Path) -> None:
    """Whatever is packed: very many files, folders in folders; and nothing goes on while it is."""

    async def work(sandbox: BubblewrapSandbox) -> tuple[str, ...]:
        many = "import os\nfor n in range(8000): open(f'f{n}', 'w').close()"
        deep = "import os\nfor n in range(1200): os.mkdir('d'); os.chdir('d')"
        await sandbox.run(f'mkdir many; cd many; python3 -c "{many}"', 20)
        await sandbox.run(f'python3 -c "{deep}"', 20)
        await sandbox.run("(while true; do date +%N > busy; done) & sleep 0.1", 5)
        return await sandbox.archive(tmp_path / "work.tar")

    left_out = inside(work)
    assert (tmp_path / "work.tar").stat().st_size <= LIMITS.disk_mib << 20
    assert len(left_out) == 20
    with tarfile.open(tmp_path / "work.tar") as tar:
        names = tar.getnames()
    assert "busy" in names and "d/d/d" in names and len(names) > 1000


def test_commands_that_cannot_be_started_are_answered() -> None:
    nul, long, after = run("echo a\0b", "echo " + "x" * 200_000, "echo on")
    assert nul.exit_code == long.exit_code == 126
    assert "null byte" in nul.output and "Argument list too long" in long.output
    assert after.output == "on\n"


def test_what_was_left_running_is_ended_when_asked() -> None:
    async def work(sandbox: BubblewrapSandbox) -> str:
        await sandbox.run("setsid sleep 1000 & sleep 1000 & echo", 5)
        await sandbox.end_processes()
        return (await sandbox.run("cat /proc/*/comm | grep -c sleep", 5)).output

    assert inside(work) == "0\n"


def test_an_archive_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(ArchiveError, match="does not unpack"):
        inside(lambda sandbox: sandbox.unpack(tmp_path / "bad.tar"))


def test_killing_everything_ends_the_sandbox_with_an_error() -> None:
    async def work(sandbox: BubblewrapSandbox) -> None:
        with pytest.raises(SandboxError, match="killed from inside"):
            await sandbox.run("kill -9 -1", 5)
        with pytest.raises(SandboxError, match="ended"):
            await sandbox.run("echo x", 5)

    inside(work)


def test_a_call_that_is_given_up_ends_the_sandbox() -> None:
    """Its answer would be taken for the next call's."""

    async def work(sandbox: BubblewrapSandbox) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await sandbox.run("sleep 5; echo late", 10)
        with pytest.raises(SandboxError, match="ended"):
            await sandbox.run("echo next", 5)

    inside(work)


def test_nothing_is_left_after_closing() -> None:
    async def work(sandbox: BubblewrapSandbox) -> str:
        return (await sandbox.run("setsid sleep 98765 & sleep 0.1; echo", 5)).output

    inside(work)
    lines = [Path("/proc", name, "cmdline") for name in os.listdir("/proc") if name.isdigit()]
    left = [line for line in lines if line.exists() and b"98765" in line.read_bytes()]
    assert not left
    assert not list(Path("/sys/fs/cgroup").glob(f"**/klong-{os.getpid()}-*"))


def test_a_machine_without_bwrap_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no 'bwrap' command; install bubblewrap"):
        Bubblewrap()


@pytest.mark.skipif(os.getuid() != 0, reason="only as root has the sandbox a user of its own")
def test_a_closed_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ValueError, match=r"closed to other users.*chmod -R a\+rX"):
        run("true", spec=SandboxSpec(LIMITS, {"/task": tmp_path}))


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SandboxError, match="Can't find source path"):
        run("true", spec=SandboxSpec(LIMITS, {"/task": Path("/no/such/folder")}))
