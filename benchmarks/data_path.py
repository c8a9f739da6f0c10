"""The way of the data, each part beside what it is compared with, in one run.

    python -m benchmarks.data_path SECTION... --out DIR [--trajectories FILE...] [--gigabytes N]

Sections: split, deliver, tokenize, encoders, disk, packing, memory, or all. Real trajectories are files of
any format that `klong data import` reads; without them the sections that need some are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_klong.config import DataConfig, SourceConfig, WindowConfig
from megatron_klong.data.blocks import TRAINED
from megatron_klong.data.dataset import build_datasets
from megatron_klong.data.header import PARTS, part, window_rule
from megatron_klong.data.packing import minimum_rows, pack_rows
from megatron_klong.data.rows import PackedRows
from megatron_klong.data.shards import ShardCounts, join_shards
from megatron_klong.data.store import TokenStore
from megatron_klong.data.tokenize import tokenize
from megatron_klong.data.windows import split_store
from megatron_klong.platform import quiet_imports
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.importing import import_trajectories, read_imported
from megatron_klong.trajectory.render import Renderer, load_renderer
from megatron_klong.trajectory.tokenizer import (
    phrase_tokenizer,
    save_tokenizer,
    train_bpe_tokenizer,
    trajectory_texts,
)
from megatron_klong.window import TrajectoryFacts, TurnFacts

WINDOW = WindowConfig(
    max_tokens=32768, overlap_tokens=4096, reserve_generation=4096, reserve_observation=8192,
    max_prefix_fraction=0.3,
)  # fmt: skip
REPEATS = 5
Figures = dict[str, Any]


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a piece of work."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Generated data


def synthetic_store(folder: Path, trajectories: int, tokens: int) -> Path:
    """A store of random trajectories of so many tokens each, with log-normal turns."""
    prefix = folder / f"synthetic-{trajectories}-{tokens}"
    if part(prefix, "json").is_file():
        return prefix
    save_tokenizer(phrase_tokenizer([], FORMATS["glm-4.5"]), folder / "bytes")
    renderer = load_renderer("glm-4.5", folder / "bytes")
    shard = folder / "shards" / "shard-0"
    shard.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    files = {
        name: (shard / name).open("wb") for name in ("bin", "marks", "turns", "sizes", "trajectories.jsonl")
    }
    total = trained = 0
    for number in range(trajectories):
        sizes = np.array(list(_blocks(draw, tokens)), dtype=np.int32)
        marks = np.zeros(int(sizes.sum()), dtype=np.uint8)
        ends = np.cumsum(sizes)
        for start, stop in zip(ends[0::2].tolist(), ends[1::2].tolist()):
            marks[start + 1 : stop] = TRAINED
        files["bin"].write(draw.integers(0, 256, len(marks)).astype(np.uint16).tobytes())
        files["marks"].write(marks.tobytes())
        files["turns"].write(np.zeros(len(sizes) // 2, dtype=np.int32).tobytes())
        files["sizes"].write(np.concatenate([[len(sizes)], sizes]).astype(np.int32).tobytes())
        label = {"id": f"t{number}", "task_id": None, "reward": None, "marked_turns": None}
        files["trajectories.jsonl"].write((json.dumps(label) + "\n").encode())
        total, trained = total + len(marks), trained + int((marks == TRAINED).sum())
    for file in files.values():
        file.close()
    counts = ShardCounts(trajectories, total, trained, (("bash",),))
    (shard / "shard.json").write_text(json.dumps(asdict(counts)))
    join_shards([shard], prefix, renderer, folder / "bytes" / "tokenizer.json")
    return prefix


def _blocks(draw: np.random.Generator, tokens: int) -> Iterator[int]:
    """Initial messages, then actions (median 150) and answers (median 300) until there are enough tokens."""
    yield 2000
    used = 2000
    while used < tokens:
        action, answer = (int(draw.lognormal(np.log(median), 0.8)) + 2 for median in (150, 300))
        yield min(action, WINDOW.reserve_generation)
        yield answer
        used += action + answer


# Sections


def split(folder: Path, _files: list[Path], _gigabytes: float) -> Figures:
    """Windows of 1,000 trajectories of 100,000 tokens: ours, the rule replayed in Python, and token lists."""
    store = TokenStore(synthetic_store(folder, 1000, 100_000))
    rule = window_rule(WINDOW, store.header)
    ours = seconds(lambda: split_store(store, rule, WINDOW))
    windows = len(split_store(store, rule, WINDOW).table)
    opening = len(store.header.opening_ids)
    replayed = lists = 0.0
    for number in range(len(store)):
        sizes = store.lengths(number).tolist()
        facts = TrajectoryFacts(
            sizes[0], tuple(TurnFacts(a - opening, o) for a, o in zip(sizes[1::2], sizes[2::2]))
        )
        start = time.perf_counter()
        contexts = _replay(rule, facts)
        replayed += time.perf_counter() - start
        stored = store.trajectory(number)
        bounds = stored.bounds.tolist()
        blocks = [stored.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])]
        labels = [
            [token if trained else -100 for token, trained in zip(block, stored.trained(a, b).tolist())]
            for block, a, b in zip(blocks, bounds, bounds[1:])
        ]
        start = time.perf_counter()
        _token_lists(rule, facts, blocks, labels, list(store.header.marker_ids))
        lists += time.perf_counter() - start
    return {
        "windows": windows, "trajectories": len(store), "tokens": store.header.tokens,
        "ours s": ours, "replayed turn by turn, counts only s": replayed, "python lists s": lists,
        "python lists / ours": lists / ours, "replayed / ours": replayed / ours,
        "contexts replayed in the last": len(contexts),
    }  # fmt: skip


def _replay(rule: Any, facts: TrajectoryFacts) -> list[Any]:
    cursor = rule.open(facts.initial_tokens)
    return [cursor.advance(turn) for turn in facts.turns]


def _token_lists(
    rule: Any, facts: TrajectoryFacts, blocks: list[list[int]], labels: list[list[int]], marker: list[int]
) -> list[tuple[list[int], list[int]]]:
    """As common stacks do: every window a list of ids and one of labels, built turn by turn."""
    cursor = rule.open(facts.initial_tokens)
    samples = []
    ids, wanted = list(blocks[0]), [-100] * len(blocks[0])
    window = 0
    for number, turn in enumerate(facts.turns):
        context = cursor.context
        if context.window != window:
            samples.append((ids, wanted))
            window = context.window
            ids, wanted = blocks[0] + marker, [-100] * (len(blocks[0]) + len(marker))
            for shown in range(context.first_turn, number):
                taken = blocks[2 * shown + 1] + blocks[2 * shown + 2]
                ids += taken
                wanted += [-100] * len(taken)
        ids += blocks[2 * number + 1] + blocks[2 * number + 2]
        wanted += labels[2 * number + 1] + [-100] * len(blocks[2 * number + 2])
        cursor.advance(turn)
    samples.append((ids, wanted))
    return samples


def deliver(folder: Path, _files: list[Path], _gigabytes: float) -> Figures:
    """Packed rows of 32,768 tokens to the trainer, beside a copy of the same bytes in memory."""
    store = synthetic_store(folder, 200, 100_000)
    config = DataConfig(
        sources={"synthetic": SourceConfig(store=store)}, window=WINDOW, validation_fraction=0
    )  # fmt: skip
    rows = PackedRows(build_datasets(config, seed=1)["synthetic"].train, WINDOW.max_tokens, seed=1)
    count = min(200, rows.rows_per_epoch)
    made = [rows.row(number) for number in range(count)]  # everything is in the page cache now
    arrays = [(row.tokens_R, row.labels_R, row.loss_mask_R) for row in made]
    size = sum(array.nbytes for row in arrays for array in row)

    def copy() -> None:
        for row in arrays:
            for array in row:
                array.copy()

    def deliver_all() -> None:
        for number in range(count):
            rows.row(number)  # not kept, like the copies: fresh pages cost more than either

    delivering = seconds(deliver_all)
    copying = seconds(copy)
    return {
        "rows": count, "MB": size / 1e6, "deliver s": delivering, "copy s": copying,
        "copy / deliver": copying / delivering, "tokens/s": count * WINDOW.max_tokens / delivering,
    }  # fmt: skip


def _imported(folder: Path, files: list[Path], times: int = 1) -> Path:
    """The trajectories, imported; several times over, where there are few of them."""
    out = folder / "imported.jsonl"
    if not out.is_file():
        import_trajectories(files, out)
    if times == 1:
        return out
    many = folder / f"imported-{times}.jsonl"
    if not many.is_file():
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        with many.open("w") as stream:
            for number in range(times):
                for record in lines:
                    stream.write(json.dumps({**record, "id": f"{record['id']}-{number}"}) + "\n")
    return many


def _bpe(folder: Path, imported: Path) -> Path:
    """A tokenizer of 8,192 tokens, trained on the trajectories themselves."""
    target = folder / "bpe"
    if not (target / "tokenizer.json").is_file():
        family = FORMATS["glm-4.5"]
        texts = (text for each in read_imported(imported) for text in trajectory_texts(each, family))
        save_tokenizer(train_bpe_tokenizer(texts, family, 8192), target)
    return target


def tokenizing(folder: Path, files: list[Path], _gigabytes: float) -> Figures:
    """One pass over the trajectories; the same with windows of 16,384 tokens; and a pass for each window."""
    imported = _imported(folder, files, times=10)
    bpe = _bpe(folder, _imported(folder, files))
    window = WindowConfig(
        max_tokens=16384, overlap_tokens=2048, reserve_generation=2048, reserve_observation=4096,
        max_prefix_fraction=0.4,
    )  # fmt: skip
    prefix = folder / "real"

    def once(processes: int | None) -> None:
        tokenize(
            imported, prefix, renderer="glm-4.5", tokenizer=bpe, processes=processes, shard_bytes=8 << 20
        )

    def windows() -> None:
        opened = TokenStore(prefix)
        split_store(opened, window_rule(window, opened.header), window)

    one_pass = seconds(lambda: once(1), 3)
    splitting = seconds(windows)
    all_cores = seconds(lambda: once(None), 3)
    store = TokenStore(prefix)
    table = split_store(store, window_rule(window, store.header), window).table
    renderer = store.renderer()
    texts = [
        renderer.decode(store.trajectory(number).tokens[: int(tokens)].tolist())
        for number, tokens in zip(table.trajectory.tolist(), table.tokens.tolist())
    ]
    each = seconds(lambda: [renderer._encode_texts([_text(text)]) for text in texts], 1)
    return {
        "trajectories": len(store), "tokens": store.header.tokens, "windows": len(table),
        "one pass s": one_pass, "windows s": splitting, "one pass with windows / one pass":
        1 + splitting / one_pass,
        "a pass for each window s": each, "all cores s": all_cores, "cores": os.cpu_count(),
        "tokens/s, one core": store.header.tokens / one_pass,
        "tokens/s, all cores": store.header.tokens / all_cores,
    }  # fmt: skip


def _text(text: str) -> Any:
    from megatron_klong.trajectory.render import Text

    return Text(text)


def encoders(folder: Path, files: list[Path], _gigabytes: float) -> Figures:
    """`tokenizers`, `fastokens` and `gigatoken` on the texts of the trajectories, all cores; ids compared."""
    imported = _imported(folder, files)
    tokenizer_file = _bpe(folder, imported) / "tokenizer.json"
    family = FORMATS["glm-4.5"]
    texts = [text for each in read_imported(imported) for text in trajectory_texts(each, family)]
    renderer = load_renderer("glm-4.5", tokenizer_file)
    figures: Figures = {"texts": len(texts), "MB": sum(map(len, texts)) / 1e6}

    def ours() -> list[list[int]]:
        return [list(each.ids) for each in renderer._tokenizer.encode_batch(texts, add_special_tokens=False)]

    expected = ours()
    count = sum(map(len, expected))
    figures["tokenizers tokens/s"] = count / seconds(ours, 3)
    for name, encode in (("fastokens", _fastokens), ("gigatoken", _gigatoken)):
        try:
            found, taken = encode(tokenizer_file, texts)
        except Exception as error:  # not installed, or does not take this tokenizer
            figures[name] = f"not run: {type(error).__name__}: {error}"
            continue
        figures[f"{name} tokens/s"] = count / taken
        figures[f"{name} differs in texts"] = sum(a != b for a, b in zip(expected, found))
    return figures


def _fastokens(file: Path, texts: list[str]) -> tuple[list[list[int]], float]:
    import fastokens

    encoder = fastokens.Tokenizer.from_file(str(file))

    def encode() -> list[list[int]]:
        return [list(each.ids) for each in encoder.encode_batch(texts)]

    return encode(), seconds(encode, 3)


def _gigatoken(file: Path, texts: list[str]) -> tuple[list[list[int]], float]:
    import gigatoken

    encoder = gigatoken.Tokenizer(str(file))

    def encode() -> list[list[int]]:
        return [list(each) for each in encoder.encode_batch_list(texts)]

    return encode(), seconds(encode, 3)


def disk(folder: Path, _files: list[Path], _gigabytes: float) -> Figures:
    """A store with its windows, beside a copy of every window (ids of two or four bytes and a mask byte)."""
    store = TokenStore(synthetic_store(folder, 1000, 100_000))
    table = split_store(store, window_rule(WINDOW, store.header), WINDOW).table
    held = sum(part(store.prefix, suffix).stat().st_size for suffix in PARTS)
    width = part(store.prefix, "bin").stat().st_size // store.header.tokens
    copies = int(table.tokens.sum()) * (width + 1)
    return {
        "windows": len(table), "windows per trajectory": len(table) / len(store), "store MB": held / 1e6,
        "copies MB": copies / 1e6, "copies / store": copies / held,
    }  # fmt: skip


def packing(folder: Path, files: list[Path], _gigabytes: float) -> Figures:
    """Rows that best fit uses, beside the lower bound L2; rows of L and of 4 L."""
    draw = np.random.default_rng(0)
    cases: dict[str, np.ndarray] = {}
    for turns in (100, 1000):
        lengths = []
        for _ in range(300):
            actions, answers = (
                np.exp(draw.normal(np.log(m), 0.8, turns)).astype(int) + 2 for m in (150, 300)
            )
            facts = TrajectoryFacts(
                2000, tuple(TurnFacts(min(a, 4096), o) for a, o in zip(actions.tolist(), answers.tolist()))
            )
            lengths += [window.tokens for window in _rule().split(facts).windows]
        cases[f"{turns} log-normal turns"] = np.array(lengths)
    if files:
        imported = _imported(folder, files)
        prefix = folder / "real"
        if not part(prefix, "json").is_file():
            tokenize(imported, prefix, renderer="glm-4.5", tokenizer=_bpe(folder, imported))
        store = TokenStore(prefix)
        table = split_store(store, window_rule(WINDOW, store.header), WINDOW).table
        cases["real trajectories"] = table.tokens[table.trains]
    figures: Figures = {}
    for name, lengths in cases.items():
        for factor in (1, 4):
            row = factor * WINDOW.max_tokens
            rows, least = len(pack_rows(lengths, row, 0)), minimum_rows(lengths, row)
            figures[f"{name}, {factor} L"] = {
                "windows": len(lengths), "rows": rows, "at least": least, "above the bound": rows / least - 1,
                "fill": float(lengths.sum()) / (rows * row),
            }  # fmt: skip
    return figures


def _rule() -> Any:
    renderer = Renderer(FORMATS["glm-4.5"], phrase_tokenizer([], FORMATS["glm-4.5"]), "")
    from megatron_klong.rl.live import live_rule

    return live_rule(WINDOW, renderer)[0]


def memory(folder: Path, files: list[Path], gigabytes: float) -> Figures:
    """Most memory of import and tokenizing, at a quarter of an input and at all of it."""
    figures: Figures = {}
    source = _imported(folder, files)
    lines = source.read_bytes().splitlines(keepends=True)
    for share in (0.25, 1.0):
        large = folder / "large.jsonl"
        with large.open("wb") as stream:
            number = 0
            while stream.tell() < share * gigabytes * 1e9:
                record = json.loads(lines[number % len(lines)])
                record["id"] = f"{record['id']}-{number}"
                stream.write(json.dumps(record).encode() + b"\n")
                number += 1
        size = large.stat().st_size / 1e9
        start = time.perf_counter()
        with PeakTree() as peak:
            import_trajectories([large], folder / "large-imported.jsonl")
        figures[f"import of {size:.2f} GB"] = {"peak MB": peak.megabytes, "s": time.perf_counter() - start}
        start = time.perf_counter()
        with PeakTree() as peak:
            tokenize(folder / "large-imported.jsonl", folder / "large", renderer="glm-4.5",
                     tokenizer=_bpe(folder, source))  # fmt: skip
        figures[f"tokenizing {size:.2f} GB"] = {"peak MB": peak.megabytes, "s": time.perf_counter() - start}
        for file in folder.glob("large*"):
            file.unlink()
    return figures


class PeakTree:
    """Most resident memory of this process and those it started together, above that at the beginning."""

    def __enter__(self) -> PeakTree:
        self._stop = threading.Event()
        self._start = self._now()
        self._peak = self._start
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        """What was found."""
        return (self._peak - self._start) / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue
            total += memory.rss - memory.shared
        return total


SECTIONS = {
    "split": split, "deliver": deliver, "tokenize": tokenizing, "encoders": encoders, "disk": disk,
    "packing": packing, "memory": memory,
}  # fmt: skip
REAL = ("tokenize", "encoders", "memory")


def main() -> int:
    """Run the sections, print them, and write ``result.json``."""
    quiet_imports()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trajectories", type=Path, nargs="*", default=[])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="input of `memory`")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = list(SECTIONS) if "all" in arguments.sections else arguments.sections
    result = arguments.out / "result.json"
    found: Figures = json.loads(result.read_text()) if result.is_file() else {}
    found["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    for name in chosen:
        if name in REAL and not arguments.trajectories:
            print(f"{name}: left out, needs --trajectories")
            continue
        print(f"== {name}: {SECTIONS[name].__doc__}", flush=True)
        found[name] = SECTIONS[name](arguments.out, arguments.trajectories, arguments.gigabytes)
        for key, value in found[name].items():
            print(f"   {key}: {value:,.4g}" if isinstance(value, float) else f"   {key}: {value}", flush=True)
        result.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
