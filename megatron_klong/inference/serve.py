"""The vLLM server process: ``python -m megatron_klong.inference.serve ARGUMENTS OF VLLM'S SERVE``.

Started by :class:`megatron_klong.inference.server.VllmServer`. It ends when its owner does, and the
engine and worker processes that vLLM starts end with the one above them: Python's spawned processes
run this file first, under the name ``__mp_main__``, before anything of vLLM's.
"""

from __future__ import annotations

import os
import runpy
import signal

from megatron_klong.inference.server import MARK, OWNER, marked_processes
from megatron_klong.platform.lifetime import die_with_parent


def _server_above() -> int:
    """Pid of the parent, a process of the same server; 0 when it is gone already."""
    parent = os.getppid()
    return parent if parent in marked_processes(os.environ[MARK]) else 0


if __name__ == "__mp_main__":
    die_with_parent(_server_above(), signal.SIGKILL)

if __name__ == "__main__":
    die_with_parent(int(os.environ[OWNER]), signal.SIGKILL)
    # Not the `vllm` command: it asks for the version of a distribution of that name, which the
    # build for CPU is not.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
