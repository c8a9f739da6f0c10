"""Token losses by chunks beside the plain way, which makes all logits: seconds and memory.

    python -m benchmarks.linear_cross_entropy [--tokens N] [--plain-tokens N] [--vocabulary N] [--hidden N]
        [--chunk N] [--scored SHARE] [--dtype float32|bfloat16] [--out FILE]

Forward and backward of the losses of random tokens, of which a share is scored. The plain ways compute all
tokens and mask: torch's (F.linear, then cross_entropy in fp32), and Megatron-Core's, which works in place
where it can. Their memory grows with the tokens, so they run with fewer, and by chunks is run with those too;
what differs then is printed. Each run is a process of its own, on the device that torch finds; memory is the
most beyond the inputs, gradients among it. What would not fit is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_klong.model.linear_cross_entropy import linear_cross_entropy

WARM_UP_TOKENS = 2
SPARE_BYTES = 2**30
"""Left free beyond what is computed to be needed: matrix products have memory of their own."""


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
        scored: the share of tokens whose losses count.
        chunk: scored tokens whose logits are held at once.
    """

    tokens: int
    vocabulary: int
    hidden: int
    chunk: int
    scored: float
    dtype: str

    def gradient_bytes(self) -> int:
        """Of hidden states and head."""
        return (self.tokens + self.vocabulary) * self.hidden * self._itemsize

    def needed_bytes(self, side: str) -> int:
        """Most memory of a side, inputs too: what of the logits it holds at once, in fp32 and in dtype."""
        low = self._itemsize if self.dtype != "float32" else 0
        if side == "chunks":
            logits = min(self.chunk, self.tokens) * self.vocabulary * (4 + low)
        else:
            # Megatron: one in fp32. torch: logits (of fp32 kept), log-softmax and its gradient.
            logits = self.tokens * self.vocabulary * (low + {"megatron": 4 + low, "torch": 12}[side])
        wide_head = 2 * self.vocabulary * self.hidden * 4
        return 2 * self.gradient_bytes() + wide_head + logits

    @property
    def _itemsize(self) -> int:
        return torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


@dataclass(frozen=True)
class Result:
    """Of one run.

    Attributes:
        seconds: of forward and backward.
        extra_bytes: most memory beyond the inputs.
    """

    tokens: int
    seconds: float
    extra_bytes: int


def main() -> int:
    """Run all sides, print a table; with ``--out`` write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--plain-tokens", type=int, default=4096, help="of the plain ways")
    parser.add_argument("--vocabulary", type=int, default=151552)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--scored", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    whole = Work(given.tokens, given.vocabulary, given.hidden, given.chunk, given.scored, given.dtype)
    if given.only:
        side, folder = given.only
        run_here(side, whole, Path(folder))
        return 0
    fewer = replace(whole, tokens=min(given.plain_tokens, whole.tokens))
    runs = [("torch", fewer), ("megatron", fewer), ("chunks", fewer)]
    if fewer != whole:
        runs.append(("chunks", whole))
    for side, work in runs:
        refuse_too_much(side, work)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {device()}; vocabulary {whole.vocabulary}, hidden "
        f"size {whole.hidden}, {whole.dtype}, {whole.scored:.0%} scored, chunks of {whole.chunk}"
    )
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, work in runs:
            folder = Path(temporary) / f"{side}-{work.tokens}"
            folder.mkdir()
            result = results[folder.name] = in_own_process(side, work, folder)
            print(
                f"{side}, {work.tokens} tokens: {result.seconds:.1f} s, {result.extra_bytes / 1e6:,.0f} MB "
                f"({work.gradient_bytes() / 1e6:,.0f} MB of it gradients)",
                flush=True,
            )
            if side != "chunks" and fewer != whole:
                of_logits = result.extra_bytes - work.gradient_bytes()
                more = of_logits * whole.tokens // work.tokens + whole.gradient_bytes()
                print(f"  in proportion, {more / 1e6:,.0f} MB at {whole.tokens} tokens")
        apart = {side: differences(Path(temporary), side, fewer) for side in ("torch", "megatron")}
    for side, largest in apart.items():
        most = ", ".join(f"{name} {amount:.1e} of {scale:.1e}" for name, (amount, scale) in largest.items())
        print(f"chunks and {side} differ by up to: {most}")
    if given.out:
        record = {"work": asdict(whole), "runs": {name: asdict(each) for name, each in results.items()}}
        given.out.write_text(json.dumps(record | {"differences": apart}, indent=1))
    return 0


def in_own_process(side: str, work: Work, folder: Path) -> Result:
    """Run one side; its tensors are in ``folder`` then."""
    options = [text for name, value in asdict(work).items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.linear_cross_entropy", *options]
    subprocess.run([*command, "--only", side, str(folder)], check=True)
    return Result(**json.loads((folder / "result.json").read_text()))


def refuse_too_much(side: str, work: Work) -> None:
    """End with the reason if the memory does not suffice."""
    needed, free = work.needed_bytes(side) + SPARE_BYTES, free_bytes()
    if needed > free:
        option = "--chunk" if side == "chunks" else "--plain-tokens"
        sys.exit(
            f"{side} with {work.tokens} tokens needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free: choose a smaller {option}"
        )


def device() -> str:
    """Where it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes() -> int:
    """Of memory, that of the device."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 1024 * _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def run_here(side: str, work: Work, folder: Path) -> None:
    """Measure one side; write ``result.json`` and, of its losses and gradients, ``tensors.pt``."""
    with sides(work)[side] as losses_of:
        forward_backward(losses_of, replace(work, tokens=WARM_UP_TOKENS))
        result, tensors = forward_backward(losses_of, work)
    (folder / "result.json").write_text(json.dumps(asdict(result)))
    torch.save(tensors, folder / "tensors.pt")


Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of hidden states, head, labels and which tokens are scored."""


def sides(work: Work) -> dict[str, contextlib.AbstractContextManager[Losses]]:
    """What is compared."""

    def by_chunks(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scored_T: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_TH, weight_VH, labels_T, scored_T, work.chunk)

    return {
        "torch": contextlib.nullcontext(by_torch),
        "megatron": megatron(),
        "chunks": contextlib.nullcontext(by_chunks),
    }


def by_torch(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scored_T: Tensor) -> Tensor:
    """Log-softmax in fp32."""
    logits_TV = functional.linear(hidden_TH, weight_VH).float()
    return functional.cross_entropy(logits_TV, labels_T, reduction="none") * scored_T


@contextlib.contextmanager
def megatron() -> Iterator[Losses]:
    """What this project's models do without chunks, on one rank."""
    from megatron_klong.config import ParallelConfig
    from megatron_klong.platform import quiet_imports

    quiet_imports()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_klong.training.initialize import distributed

    def by_megatron(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scored_T: Tensor) -> Tensor:
        logits_T1V = functional.linear(hidden_TH, weight_VH)[:, None]
        losses_T1: Tensor = vocab_parallel_cross_entropy(logits_T1V, labels_T[:, None])
        return losses_T1[:, 0] * scored_T

    with tempfile.TemporaryDirectory() as meeting:
        at = f"file://{meeting}/rendezvous"
        with distributed(ParallelConfig(), seed=1, init_method=at, rank=0, world_size=1):
            yield by_megatron


def forward_backward(losses_of: Losses, work: Work) -> tuple[Result, dict[str, Tensor]]:
    """Once, of inputs from a seed: logits with a standard deviation of 2, any gradients of the losses."""
    draw = torch.Generator().manual_seed(1)
    dtype, place = getattr(torch, work.dtype), device()
    hidden_TH = torch.randn(work.tokens, work.hidden, generator=draw).to(place, dtype).requires_grad_()
    weight_VH = torch.randn(work.vocabulary, work.hidden, generator=draw).mul_(2 * work.hidden**-0.5)
    weight_VH = weight_VH.to(place, dtype).requires_grad_()
    labels_T = torch.randint(work.vocabulary, (work.tokens,), generator=draw).to(place)
    scored_T = (torch.rand(work.tokens, generator=draw) < work.scored).to(place)
    gradient_T = torch.randn(work.tokens, generator=draw).to(place)
    with Peak() as peak:
        start = time.perf_counter()
        losses_T = losses_of(hidden_TH, weight_VH, labels_T, scored_T)
        losses_T.backward(gradient_T)  # type: ignore[no-untyped-call]
        if place == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    tensors = {"losses": losses_T.detach(), "hidden": hidden_TH.grad, "head": weight_VH.grad}
    return Result(work.tokens, seconds, peak.extra_bytes), tensors


class Peak:
    """Most memory of the device within, beyond that at the beginning; of the CPU, resident memory."""

    def __enter__(self) -> Peak:
        if device() == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            # Sets the high-water mark back to what is held now. getrusage has another one, which a process
            # begins with at that of its parent.
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _kilobytes(Path("/proc/self/status"), "VmRSS") * 1024
        return self

    def __exit__(self, *_error: object) -> None:
        if device() == "cuda":
            most = torch.cuda.max_memory_allocated()
        else:
            most = _kilobytes(Path("/proc/self/status"), "VmHWM") * 1024
        self.extra_bytes = most - self._start


def _kilobytes(file: Path, name: str) -> int:
    """A line of a file of Linux's that tells memory."""
    return int(file.read_text().split(f"{name}:")[1].split()[0])


def differences(folder: Path, side: str, work: Work) -> dict[str, tuple[float, float]]:
    """Of losses and gradients: the largest difference, and the largest amount."""
    plain, chunked = (
        torch.load(folder / f"{name}-{work.tokens}" / "tensors.pt", map_location="cpu")
        for name in (side, "chunks")
    )
    return {
        name: (float((chunked[name] - tensor).abs().max()), float(tensor.abs().max()))
        for name, tensor in plain.items()
    }


if __name__ == "__main__":
    sys.exit(main())
