"""Conversion of a checkpoint beside copying the same bytes on the same disk.

    python -m benchmarks.conversion --out DIR [--gigabytes N] [--repeats K]

Makes a GLM-4.5-shaped model of that size (bf16, experts one by one, a prediction layer), imports it, exports
it, and copies what each of them reads. Everything is written through to the disk; before each the page cache
is dropped where that is allowed (root). Memory is what the process holds beyond what it held before and
beside the page cache (RssAnon), looked at every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_klong.platform import quiet_imports

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5120, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 64, "moe_intermediate_size": 768, "n_routed_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 65536, "num_nextn_predict_layers": 1,
}  # fmt: skip
LAYER_GIGABYTES = 0.63


@dataclass(frozen=True)
class Timing:
    """One kind of work.

    Attributes:
        seconds: median.
        megabytes: most memory, beyond that before.
    """

    seconds: float
    megabytes: float


def main() -> int:
    """Measure, print a table, write ``conversion.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet_imports()
    from megatron_klong.checks.tiny import write_tiny_model
    from megatron_klong.convert.exporting import export_checkpoint
    from megatron_klong.convert.importing import import_checkpoint

    out: Path = arguments.out
    source = out / "hf"
    if not source.is_dir():
        layers = max(2, round(arguments.gigabytes / LAYER_GIGABYTES))
        write_tiny_model(source, "bf16", **SHAPE, num_hidden_layers=layers)
    size = sum(file.stat().st_size for file in source.iterdir())
    megatron, back = out / "megatron", out / "back"
    work: dict[str, tuple[Path, Callable[[], object]]] = {
        "copy of the Hugging Face folder": (out / "copy", lambda: copy(source, out / "copy")),
        "import": (megatron, lambda: import_checkpoint(source, megatron)),
        "copy of the Megatron checkpoint": (out / "copy", lambda: copy(megatron, out / "copy")),
        "export": (back, lambda: export_checkpoint(megatron, back)),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    held: dict[str, list[float]] = {name: [] for name in work}
    dropped = False
    for _ in range(arguments.repeats):
        for name, (target, task) in work.items():
            shutil.rmtree(target, ignore_errors=True)
            dropped = drop_page_cache()
            with PeakMemory() as peak:
                start = time.perf_counter()
                task()
                taken[name].append(time.perf_counter() - start)
            held[name].append(peak.megabytes)
    timings = {name: Timing(statistics.median(taken[name]), max(held[name])) for name in work}
    largest = 2 * SHAPE["n_routed_experts"] * SHAPE["moe_intermediate_size"] * SHAPE["hidden_size"] * 2 / 1e6
    print(f"{size / 1e9:.2f} GB, {platform.machine()}, {os.cpu_count()} cores, page cache dropped: {dropped}")
    print(f"the largest fused tensor has {largest:.0f} MB")
    for name, timing in timings.items():
        speed = size / 1e6 / timing.seconds
        print(f"{name}: {timing.seconds:.2f} s, {speed:.0f} MB/s, {timing.megabytes:.0f} MB of memory")
    for name, reference in (
        ("import", "copy of the Hugging Face folder"), ("export", "copy of the Megatron checkpoint")
    ):  # fmt: skip
        print(f"{name}: {timings[reference].seconds / timings[name].seconds:.0%} of the speed of copying")
    result = {name: asdict(timing) for name, timing in timings.items()}
    (out / "conversion.json").write_text(json.dumps(result | {"bytes": size}, indent=1))
    return 0


def copy(source: Path, target: Path) -> None:
    """Every file, through to the disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())


def drop_page_cache() -> bool:
    """Whether it could be dropped."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


class PeakMemory:
    """Most anonymous memory of this process, beyond that at the beginning."""

    def __enter__(self) -> PeakMemory:
        self._end = threading.Event()
        self._start = self._most = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()
        self.megabytes = (self._most - self._start) / 1e3

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        """In kB."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(main())
