"""The CPU platform replaces what it says and nothing where it must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import torch
from megatron_klong.platform import activate
"""


def run(code: str) -> str:
    """In a process of its own: what is replaced stays replaced."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE + code], capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr.strip().splitlines()[-1] if done.returncode else done.stdout


def test_cuda_names_work_on_the_cpu() -> None:
    code = """
assert activate() == activate()  # again without effect
assert torch.cuda.current_device() == torch.device("cpu")
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.tensor([1.0, 2.0], device="cuda:0").device.type == "cpu"
assert torch.ones(2).cuda().device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert torch.zeros(2).type(torch.int32).dtype == torch.int32
torch.cuda.manual_seed(3)
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(4))
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
print("fine")
"""
    assert run(code) == "fine\n"


def test_nothing_is_replaced_before_activation() -> None:
    assert run("print(torch.zeros(2).type(), torch.cuda.Stream.__module__)") == (
        "torch.FloatTensor torch.cuda.streams\n"
    )


@pytest.mark.parametrize("state", ["is_available", "is_initialized"])
def test_refuses_where_cuda_is_in_use(state: str) -> None:
    code = f"""
torch.cuda.{state} = lambda: True  # this machine has no GPU that could say so itself
from megatron_klong.platform import cpu
cpu.install()
"""
    assert "RuntimeError: platform.cpu replaces torch.cuda functions and must not load" in run(code)


def test_refuses_another_megatron() -> None:
    code = """
from megatron_klong.platform import cpu
cpu.SUPPORTED_MEGATRON = "9.9."
activate()
"""
    assert "is written for megatron-core 9.9.* and found 0.16.1" in run(code)
