"""A vLLM server as a child process: started, watched, stopped, its log kept. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx

from megatron_klong.config.server import ServerConfig
from megatron_klong.inference.wire import ServerError

OWNER = "KLONG_SERVER_OWNER"
"""Environment variable with the pid of the process that a server works for."""

MARK = "KLONG_SERVER_MARK"
"""Environment variable that all processes of one server share. They rename themselves, so this is
the only sign by which they can be found."""

_GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.2
_ERROR = re.compile(r"^(?!.*\bWARNING\b).*?\b([A-Z]\w*(?:Error|Exception): .+)$", re.MULTILINE)


class VllmServer:
    """One server; start it from a thread that lives as long as the server shall.

    Args:
        config: what to serve, and how.
        log: file for everything that vLLM prints; a restart appends to it.

    Worked example::

        with VllmServer(config, Path("run/server.log")) as server:
            TokenClient(server.url)
    """

    def __init__(self, config: ServerConfig, log: Path) -> None:
        self.config = config
        self.log = log
        self.mark = uuid.uuid4().hex
        self._port = config.port or _free_port(config.host)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._was_ready = False

    @property
    def url(self) -> str:
        """Where it is reached; the same after a restart."""
        return f"http://{self.config.address or self.config.host}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the server, the parent of its engine."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the process and return at once; :meth:`wait_ready` waits for it.

        Raises:
            ValueError: vLLM is not installed, or cannot serve this model on this machine.
        """
        assert self._process is None, "already started"
        # The kernel ties the server to the thread that starts it.
        assert threading.current_thread() is threading.main_thread(), "start from the main thread"
        on_gpu = _machine_has_gpu()
        _check(self.config, on_gpu)
        _require_free(self.config.host, self._port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_klong.inference.serve", *self._arguments(on_gpu)],
                env=self._environment(on_gpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches only us
            )

    def wait_ready(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait until it answers.

        Args:
            on_wait: called at every look.

        Raises:
            ServerError: it died (with what its log says) or did not answer in ``start_seconds``.
        """
        deadline = time.monotonic() + self.config.start_seconds
        while not self.healthy():
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.url}: no answer after {self.config.start_seconds:.0f} s "
                    f"(server.start_seconds); its log: {self.log}"
                )
            on_wait()
            time.sleep(_POLL_SECONDS)
        self.check()
        self._was_ready = True

    def healthy(self) -> bool:
        """Whether it answers, and its engine is alive."""
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
            return answer.status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def check(self) -> None:
        """Raise a :class:`ServerError` that says why, when the process has ended."""
        assert self._process is not None, "not started"
        code = self._process.poll()
        if code is None:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ServerError(f"{self.url}: the vLLM server {how}{self._cause()}; its log: {self.log}")

    def restart(self) -> None:
        """End whatever is left of it, start it anew at the same address, and wait for it."""
        self.stop()
        self.start()
        self.wait_ready()

    def stop(self) -> None:
        """End it, politely and then by force, and everything it started."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        for pid in marked_processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process, self._was_ready = None, False

    def __enter__(self) -> VllmServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self, on_gpu: bool) -> list[str]:
        c = self.config
        return [
            "--model", str(c.model), "--skip-tokenizer-init",
            "--host", c.host, "--port", str(self._port),
            "--dtype", c.dtype, "--max-model-len", str(c.max_model_len),
            "--max-num-seqs", str(c.max_num_seqs), "--block-size", str(c.block_size),
            "--tensor-parallel-size", str(c.tensor_parallel),
            *(["--gpu-memory-utilization", str(c.gpu_memory_utilization)] if on_gpu else ["--enforce-eager"]),
            "--logprobs-mode", "processed_logprobs",
            "--enable-prompt-tokens-details", "--enable-scale-out",
            "--weight-transfer-config", json.dumps({"backend": c.transfer}),
            *c.extra_args,
        ]  # fmt: skip

    def _environment(self, on_gpu: bool) -> dict[str, str]:
        environment = {
            **os.environ,
            OWNER: str(os.getpid()),
            MARK: self.mark,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # so that its processes run our serve.py first
            "SPT_NOENV": "1",  # renaming a process would wipe the mark out of its environment
            "VLLM_SERVER_DEV_MODE": "1",  # the routes for pausing and for weights
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.config.devices
        if not on_gpu:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.config.kv_cache_gib)
            environment["TORCHDYNAMO_DISABLE"] = "1"
        if self.config.transfer == "ipc":
            environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory are pickled
        return environment

    def _cause(self) -> str:
        """Of a server that failed to start, the first error in its log: those after it follow from it."""
        if self._was_ready:
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            found = _ERROR.search(log.read().decode(errors="replace"))
        return f" ({found[1].strip()})" if found else ""


def marked_processes(mark: str) -> list[int]:
    """Pids of this machine's processes that carry a server's mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _check(config: ServerConfig, on_gpu: bool) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; `make install` installs it")
    file = config.model / "config.json"
    if not file.is_file():
        raise ValueError(f"server.model={config.model}: no config.json there")
    if not on_gpu:
        if config.transfer != "shm":
            raise ValueError(f"server.transfer={config.transfer} needs a GPU; use shm on this machine")
        raw = json.loads(file.read_text())
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        if head_dim % 32:
            raise ValueError(f"{file}: head_dim={head_dim}: vLLM's CPU attention needs a multiple of 32")


def _machine_has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def _require_free(host: str, port: int) -> None:
    """Another server there would answer in ours' place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"server.port={port}: {host}:{port} is taken: {error.strerror}") from error


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
