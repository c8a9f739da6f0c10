"""Tokenizing: the same store by any number of processes, and after any interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_klong.config import WindowConfig
from megatron_klong.data.blocks import TRAINED
from megatron_klong.data.check import check_store, shown_text
from megatron_klong.data.header import PARTS, part
from megatron_klong.data.store import TokenStore
from megatron_klong.data.tokenize import TokenizeProgress, tokenize
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.render import TokenKind, load_renderer
from megatron_klong.trajectory.schema import Message, ToolCall, Trajectory
from megatron_klong.trajectory.tokenizer import phrase_tokenizer, save_tokenizer

SHARD = 20_000


@pytest.fixture(scope="module")
def imported(domain: Path) -> Path:
    """The domain's trajectories; each line is some kilobytes, so shards begin inside lines."""
    return domain / "trajectories.jsonl"


def run(domain: Path, imported: Path, prefix: Path, **options: object) -> TokenStore:
    tokenize(
        imported, prefix, renderer="glm-4.5", tokenizer=domain / "tokenizer", **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return TokenStore(prefix)


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: part(prefix, suffix).read_bytes() for suffix in PARTS}


def test_the_store_does_not_depend_on_how_it_is_made(domain: Path, imported: Path, tmp_path: Path) -> None:
    seen: list[TokenizeProgress] = []
    whole = run(domain, imported, tmp_path / "whole", processes=1)
    run(domain, imported, tmp_path / "parts", processes=2, shard_bytes=SHARD, on_progress=seen.append)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert [each.total for each in seen] == [imported.stat().st_size] * len(seen)
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert len(seen) == -(-imported.stat().st_size // SHARD) + 1
    assert seen[-1].done == seen[-1].total and seen[-1].trajectories == len(whole)
    # And not on where lines fall into shards.
    with imported.open("rb") as lines:
        first, second = next(lines), next(lines)
    (tmp_path / "two.jsonl").write_bytes(first + second)
    for size in (len(first) - 1, len(first), len(first) + 1, len(first) // 2, 3000):
        store = run(domain, tmp_path / "two.jsonl", tmp_path / f"two-{size}", processes=1, shard_bytes=size)
        assert [label.id for label in store.labels] == [json.loads(line)["id"] for line in (first, second)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_goes_on(domain: Path, imported: Path, tmp_path: Path, processes: int) -> None:
    """`kill -9` in the middle: what was rendered is not rendered again, and the store is the same."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom megatron_klong.data.tokenize import tokenize\n"
        f"tokenize(Path({str(imported)!r}), Path({str(tmp_path / 'store')!r}), renderer='glm-4.5',"
        f" tokenizer=Path({str(domain / 'tokenizer')!r}), processes={processes}, shard_bytes={SHARD},"
        " on_progress=lambda at: time.sleep(0.2))"
    )
    (tmp_path / "script.py").write_text(f"if __name__ == '__main__':\n    exec({script!r})\n")
    started = subprocess.Popen([sys.executable, "-W", "ignore", str(tmp_path / "script.py")])
    building = tmp_path / ".store.building"
    deadline = time.monotonic() + 120
    while len(list(building.glob("*/shard-*"))) < 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    helpers = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGKILL)
    started.wait()
    psutil.wait_procs(helpers, timeout=10)
    assert not any(helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE for helper in helpers)
    assert not part(tmp_path / "store", "json").exists()

    def times() -> dict[str, int]:
        return {shard.name: (shard / "bin").stat().st_mtime_ns for shard in building.glob("*/shard-*")}

    kept = times()
    first: list[TokenizeProgress] = []
    rendered: list[dict[str, int]] = []

    def look(progress: TokenizeProgress) -> None:
        first.append(progress)
        rendered.append(
            {shard.name: (shard / "bin").stat().st_mtime_ns for shard in building.glob("*/shard-*")}
        )

    run(domain, imported, tmp_path / "store", processes=processes, shard_bytes=SHARD, on_progress=look)
    assert first[0].done > 0
    assert kept.items() <= rendered[-1].items()
    run(domain, imported, tmp_path / "whole", processes=1)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert not building.exists()


def test_other_inputs_start_anew(domain: Path, imported: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    lines = imported.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + "{}\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:3: messages: Field required; run `klong data import`"):
        run(domain, file, tmp_path / "store", processes=1, shard_bytes=len(lines[0]))
    assert len(list((tmp_path / ".store.building").glob("*/shard-000000"))) == 1
    file.write_text("".join(lines[1:3]))
    store = run(domain, file, tmp_path / "store", processes=1, shard_bytes=len(lines[0]))
    assert [label.id for label in store.labels] == [json.loads(line)["id"] for line in lines[1:3]]
    assert not (tmp_path / ".store.building").exists()


def test_records_that_were_not_imported_are_refused(domain: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1: id: is missing; run `klong data import`"):
        run(domain, tmp_path / "t.jsonl", tmp_path / "store")


def test_an_input_that_changes_meanwhile_is_refused(domain: Path, imported: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(imported.read_bytes())
    with pytest.raises(ValueError, match="was changed while it was read"):
        run(domain, file, tmp_path / "store", processes=1, on_progress=lambda _: os.utime(file, ns=(1, 1)))


def test_an_error_in_another_process_is_told(domain: Path, imported: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(imported.read_text() + "{broken\n")
    count = len(imported.read_text().splitlines())
    with pytest.raises(ValueError, match=rf"t\.jsonl:{count + 1}: not JSON"):
        run(domain, file, tmp_path / "store", processes=2, shard_bytes=SHARD)


def test_two_cannot_write_one_store(domain: Path, imported: Path, tmp_path: Path) -> None:
    def other(_progress: TokenizeProgress) -> None:
        with pytest.raises(ValueError, match="another process is writing it"):
            run(domain, imported, tmp_path / "store")

    run(domain, imported, tmp_path / "store", processes=1, on_progress=other)


def test_one_id_twice_is_refused(domain: Path, imported: Path, tmp_path: Path) -> None:
    line = imported.read_text().splitlines(keepends=True)[0]
    (tmp_path / "t.jsonl").write_text(line * 2)
    with pytest.raises(ValueError, match="two trajectories have the id"):
        run(domain, tmp_path / "t.jsonl", tmp_path / "store", processes=1, shard_bytes=len(line))


# What tokens are a part of


TRAJECTORY = Trajectory(
    "t",
    (
        Message("system", "be good"),
        Message("user", "do it"),
        Message("assistant", "so", "hm", (ToolCall("f", {"x": "1"}, "c"),)),
        Message("tool", "result", tool_call_id="c"),
        Message("assistant", "copied", context_only=True),
        Message("user", "more"),
        Message("assistant", "done"),
    ),
    tools=({"name": "f"},),
)  # fmt: skip


def text_store(folder: Path, family: str, *trajectories: Trajectory) -> TokenStore:
    """A store whose tokens are bytes, so that texts can be read off."""
    save_tokenizer(phrase_tokenizer([], FORMATS[family]), folder / "tokenizer")
    (folder / "t.jsonl").write_text("".join(write_openai_chat(each) + "\n" for each in trajectories))
    tokenize(folder / "t.jsonl", folder / "store", renderer=family, tokenizer=folder / "tokenizer")
    return TokenStore(folder / "store")


@pytest.mark.parametrize("family", ["glm-4.5", "qwen3"])
def test_every_token_knows_what_it_is_a_part_of(tmp_path: Path, family: str) -> None:
    store = text_store(tmp_path, family, TRAJECTORY)
    stored, renderer = store.trajectory(0), store.renderer()
    kinds = stored.marks & ~np.uint8(TRAINED)

    def text(kind: TokenKind) -> str:
        return renderer.decode(stored.tokens[kinds == kind].tolist())

    assert "be good" in text(TokenKind.SYSTEM) and "name" not in text(TokenKind.SYSTEM)
    assert text(TokenKind.TOOLS).strip() == '{"name": "f"}'
    user = text(TokenKind.USER)
    assert "do it" in user and "more" in user and "result" not in user
    assert "result" in text(TokenKind.TOOL)
    assert "hm" in text(TokenKind.REASONING) and "so" not in text(TokenKind.REASONING)
    assert "".join(text(TokenKind.CONTENT).split()) == "socopieddone"
    assert text(TokenKind.CALL).count("tool_call>") == 2
    assert len(text(TokenKind.STOP)) == (30 if family == "qwen3" else len("<|observation|><|user|><|user|>"))
    assert "do it" not in text(TokenKind.TEMPLATE)
    # Loss on all that the assistant produced, the copied message left out.
    trained = renderer.decode(stored.tokens[stored.trained(0, len(stored.tokens))].tolist())
    assert "so" in trained and "hm" in trained and "done" in trained
    assert not any(word in trained for word in ("copied", "be good", "do it", "result", "assistant"))


# Looking through a store


WINDOW = WindowConfig(max_tokens=1000, overlap_tokens=0, reserve_generation=120, reserve_observation=100)


def test_a_store_is_looked_through(tmp_path: Path) -> None:
    long = Trajectory("long", (Message("user", "do it"), Message("assistant", "x" * 300)))
    again = Trajectory("again", TRAJECTORY.messages, TRAJECTORY.tools)
    store = text_store(tmp_path, "glm-4.5", TRAJECTORY, long, again)
    found = check_store(store, WINDOW)
    assert found.problems == ()
    assert (found.trajectories, found.turns, found.tokens) == (3, 7, store.header.tokens)
    assert sum(count.tokens for count in found.kinds.values()) == store.header.tokens
    assert sum(count.trained for count in found.kinds.values()) == store.header.trained_tokens
    assert found.kinds["content"].tokens - found.kinds["content"].trained == 2 * len("\ncopied")
    assert found.longest[0].trajectory == "long" and found.longest[0].action_tokens > 300
    assert found.duplicates == (("t", "again"),) and found.duplicate_trajectories == 1
    assert found.same_start == 2
    by_reason = found.untrained.by_reason
    assert by_reason["action_over_limit"] == found.longest[0].action_tokens - 1  # without its opening
    copied = store.lengths(0)[3] - 1
    assert by_reason["context_only"] == 2 * copied
    assert found.untrained.share == pytest.approx(sum(by_reason.values()) / found.untrained.assistant_tokens)
    assert check_store(store, None).untrained.by_reason == {"context_only": 2 * copied}
    shown = shown_text(store.trajectory(0), store.renderer(), 400)
    assert "⟦\n<think>hm</think>\nso" in shown and "⟦" not in shown.split("copied")[0][-40:]


@pytest.mark.parametrize("suffix", ["bin", "marks", "turns", "tokenizer.json"])
def test_a_store_that_was_changed_is_found_out(tmp_path: Path, suffix: str) -> None:
    store = text_store(tmp_path, "glm-4.5", TRAJECTORY)
    file = part(store.prefix, suffix)
    content = bytearray(file.read_bytes())
    if suffix == "tokenizer.json":
        content = content.replace(b'"ByteLevel"', b'"ByteLevel" ', 1)
    else:
        content[-4] ^= 1
    file.write_bytes(content)
    problems = " ".join(check_store(TokenStore(store.prefix), None).problems)
    assert ("is not the tokenizer" if suffix == "tokenizer.json" else "has changed since") in problems


# Blends


def test_renderers_are_found_by_file_or_folder(domain: Path) -> None:
    by_folder = load_renderer("glm-4.5", domain / "tokenizer")
    by_file = load_renderer("glm-4.5", domain / "tokenizer" / "tokenizer.json")
    assert by_folder.fingerprint == by_file.fingerprint
    assert os.environ.get("TOKENIZERS_PARALLELISM") is None  # set in helpers only
