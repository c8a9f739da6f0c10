"""A real vLLM server beside real Megatron ranks: parity, syncs, and everything that can go wrong in one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from megatron_klong.config import ParallelConfig, ServerConfig
from megatron_klong.inference.client import TokenClient
from megatron_klong.inference.cpu_moe import forget_kernels
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.server import VllmServer, marked_processes
from megatron_klong.inference.shm_segment import Segment
from megatron_klong.inference.sync import SyncReport
from megatron_klong.inference.wire import Generation, Sampling, ServerError, VersionError
from tests import reference, sync_ranks
from tests.ranks import RankPool
from tests.sync_ranks import FULL, VICTIM, prompts

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    reference.reference_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """An fp32 server; its workers import the tests, for faults in them."""
    config = ServerConfig(
        model=weights, dtype="float32", max_model_len=256,
        extra_args=("--worker-extension-cls", "tests.vllm_faults.Faults"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with VllmServer(config, tmp_path_factory.mktemp("log") / "server.log") as started:
            yield started


@pytest.fixture
def fleet(server: VllmServer) -> Iterator[Fleet]:
    opened = Fleet([server.url])
    yield opened
    opened.close()


def reference_log_probs(ids: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        table = torch.log_softmax(reference.reference_model()(torch.tensor([ids])).logits[0], -1)
    return [float(table[place, ids[place + 1]]) for place in range(len(ids) - 1)]


def test_megatron_transformers_and_vllm_agree_in_fp32(ranks: RankPool, weights: Path, fleet: Fleet) -> None:
    ours = ranks.run(sync_ranks.log_probs, FULL, 4, folder=weights, precision="fp32")
    assert all(answer == ours[0] for answer in ours)  # every rank hears the same
    for ids, megatron in zip(prompts(), ours[0]):
        expected = reference_log_probs(ids)
        assert megatron == pytest.approx(expected, abs=1e-4)
        assert fleet.score(ids) == [pytest.approx(expected, abs=1e-4)]
        (log_prob, _, _), = fleet.next_token(ids[:-1], ids[-1])  # fmt: skip
        assert log_prob == pytest.approx(expected[-1], abs=1e-4)


def test_answers_carry_the_log_probs_they_were_sampled_from(server: VllmServer) -> None:
    """At a temperature, against transformers, token by token; with a stop token."""
    prompt, sampling = (
        prompts()[1],
        Sampling(max_tokens=40, temperature=0.7, stop_token_ids=(3, 4, 5), seed=1),
    )

    async def ask() -> list[Generation]:
        async with TokenClient(server.url) as client:
            version = Fleet([server.url]).versions()[0]
            same = await asyncio.gather(*(client.generate(prompt, sampling, version) for _ in range(3)))
            short = await client.generate(prompt, Sampling(max_tokens=2), version)
            with pytest.raises(
                VersionError, match=f"was asked of weights 'w9', its tokens are 0..2 by '{version}'"
            ):
                await client.generate(prompt, Sampling(max_tokens=2), "w9")
            with pytest.raises(ServerError, match=r"HTTP 400: .*256"):
                await client.generate([1] * 300, Sampling(max_tokens=2), version)
            assert await client.score(prompt) == pytest.approx(reference_log_probs(prompt), abs=1e-4)
            return [*same, short]

    *same, short = asyncio.run(ask())
    assert len({answer.token_ids for answer in same}) == 1  # the seed holds
    answer = same[0]
    assert answer.finish_reason == ("stop" if answer.token_ids[-1] in (3, 4, 5) else "length")
    assert short.finish_reason == "length" and len(short.token_ids) == 2
    with torch.no_grad():
        logits = reference.reference_model()(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
    table = torch.log_softmax(logits[len(prompt) - 1 : -1] / 0.7, -1)
    expected = [float(row[token]) for row, token in zip(table, answer.token_ids)]
    assert answer.log_probs == pytest.approx(expected, abs=1e-4)


def test_twenty_syncs_of_changing_weights(
    ranks: RankPool, weights: Path, fleet: Fleet, server: VllmServer
) -> None:
    answers = ranks.run(sync_ranks.many_syncs, FULL, 4, folder=weights, urls=[server.url], count=20)
    before = fleet.score(prompts()[2])
    for number, report in enumerate(answers[0]):
        assert isinstance(report, SyncReport), report
        assert report.version == f"w{number}"
        assert report.difference < 1e-4
        assert report.bytes == sum(
            tensor.nbytes for tensor in load_file(weights / "model.safetensors").values()
        )
    assert [report.version for report in answers[3]] == [f"w{number}" for number in range(20)]
    assert fleet.versions() == ["w19"]
    # The weights moved far in those steps: agreement with the first ones would be an accident.
    assert before != [pytest.approx(reference_log_probs(prompts()[2]), abs=1e-1)]


def cannot_be_asked(server: VllmServer) -> bool:
    """Whether a request to the paused server stays without an answer."""

    async def ask() -> bool:
        async with TokenClient(server.url, timeout_seconds=1.5) as client:
            try:
                await client.generate([1, 2, 3], Sampling(max_tokens=1), "faulty")
            except ServerError as error:
                return "ReadTimeout" in str(error)
            return False

    return asyncio.run(ask())


def with_a_fault(
    ranks: RankPool, weights: Path, server: VllmServer, folder: Path, fault: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[list[SyncReport | str]]:  # fmt: skip
    """Runs the three syncs of :func:`sync_ranks.a_fault_and_its_cure`, with a look at the server between."""
    ready, seen = folder / "ready", folder / "seen"
    with ThreadPoolExecutor() as aside:
        running = aside.submit(
            ranks.run, sync_ranks.a_fault_and_its_cure, FULL, 4,
            folder=weights, urls=[server.url], fault=fault, ready=ready, seen=seen,
        )  # fmt: skip
        try:
            while not ready.exists() and not running.done():
                time.sleep(0.05)
            if not running.done():
                meanwhile()
        finally:
            seen.touch()
        return running.result()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", r"token \d+ of a probe of \d+ has log-prob .* more than the tolerance 0.0001 apart"),
        ("misgathered", "RuntimeError: tensor 'decoder.layers.2.mlp.* did not arrive as its ranks hold it"),
        ("missing", f"lacks 1 of 129 tensors; the first is '{VICTIM}'"),
        ("late", f"tensor '{VICTIM}' came too late: after 8 s of the sync"),
        ("twice", f"tensor '{VICTIM}' is none of the model's, or came twice"),
        ("corrupted", f"tensor '{VICTIM}' was changed on its way"),
        ("misshapen", rf"tensor '{VICTIM}' came with shape \(63, 64\), the model's has \(64, 64\)"),
        ("broken", "FloatingPointError: a gather that fails on the sender alone"),
        ("stale-cache", r"\d+ tokens of a probe came from a cache just cleared"),
    ],
)
def test_a_sync_with_a_fault_is_caught_and_nothing_of_it_is_served(
    ranks: RankPool, weights: Path, server: VllmServer, fleet: Fleet, tmp_path: Path, fault: str, message: str
) -> None:
    def look() -> None:
        assert fleet.versions() == ["unsynced faulty"]
        assert httpx.get(f"{server.url}/is_paused").json() == {"is_paused": True}
        assert cannot_be_asked(server)

    answers = with_a_fault(ranks, weights, server, tmp_path, fault, look)
    before, faulty, after = answers[0]
    assert isinstance(before, SyncReport), before
    assert isinstance(faulty, str)
    assert faulty.startswith("weights 'faulty' did not reach the servers, which stay paused: ")
    assert re.search(message, faulty), faulty
    assert all(answer[1] == faulty for answer in answers)  # every rank hears of it
    assert isinstance(after, SyncReport), after  # the same server takes the next sync
    assert fleet.versions() == ["after"]


def test_without_our_cure_cpu_experts_answer_from_old_weights(
    ranks: RankPool, weights: Path, server: VllmServer, tmp_path: Path
) -> None:
    def call(method: str) -> None:
        httpx.post(f"{server.url}/collective_rpc", json={"method": method}).raise_for_status()

    call("take_the_cure_away")
    try:
        answers = with_a_fault(ranks, weights, server, tmp_path, "none", lambda: call("bring_the_cure_back"))[
            0
        ]
    finally:
        call("bring_the_cure_back")
    assert any(isinstance(answer, str) and "apart" in answer for answer in answers[:2]), answers
    assert isinstance(answers[2], SyncReport), answers[2]


def test_the_cure_refuses_a_vllm_it_was_not_written_for() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM 0\.33\.1: the reload of CPU experts was examined for"):
        forget_kernels(torch.nn.Linear(1, 1), "0.33.1")


def test_a_cache_that_is_held_says_so_in_a_200_and_ours_insists(server: VllmServer, fleet: Fleet) -> None:
    """The trap: while frozen requests hold blocks, the plain reset answers 200 with success false."""
    fleet.resume()
    version = fleet.versions()[0]

    async def ask() -> None:
        async with TokenClient(server.url) as client, httpx.AsyncClient(base_url=server.url) as control:
            # One is too fast to be caught in the middle by surely; eight are at work for a second or more.
            asked = [client.generate(prompts()[3], Sampling(max_tokens=190), version) for _ in range(8)]
            tasks = [asyncio.create_task(one) for one in asked]
            while not await running(control):
                assert not any(task.done() for task in tasks)
            await control.post("/pause?mode=keep&clear_cache=false")
            answer = await control.post("/reset_prefix_cache")
            assert (answer.status_code, answer.json()) == (200, {"success": False})
            await asyncio.to_thread(fleet.reset_prefix_cache)
            await control.post("/resume")
            assert [len(answer.token_ids) for answer in await asyncio.gather(*tasks)] == [190] * 8

    asyncio.run(ask())


async def running(control: httpx.AsyncClient) -> bool:
    """Whether the server generates something at this moment."""
    metrics = (await control.get("/metrics")).text
    counts = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert counts, "the server reports no running requests"
    return any(float(count) > 0 for count in counts)


def test_a_chunk_of_an_earlier_sync_is_refused(fleet: Fleet, server: VllmServer) -> None:
    fleet.init_weight_transfer_engine({"segments": []})
    fleet.start_weight_update()
    fleet.update_weights({"sync": 7, "slots": []})
    with pytest.raises(ServerError, match="a chunk of sync 6 came late, into sync 7"):
        fleet.update_weights({"sync": 6, "slots": []})
    with pytest.raises(ServerError, match="finish_weight_update called without"):
        fleet.finish_weight_update()
    fleet.start_weight_update()
    with pytest.raises(ServerError, match="was not committed; 0 of 129 tensors have come"):
        fleet.finish_weight_update()
    with pytest.raises(ServerError, match="abandoned, as asked"):
        fleet.update_weights({"abandon": True})


def test_a_server_killed_in_the_middle_of_a_sync_comes_back_to_the_current_weights(
    ranks: RankPool, weights: Path, server: VllmServer, fleet: Fleet, tmp_path: Path
) -> None:
    def look() -> None:
        with pytest.raises(
            ServerError, match=r"the vLLM server was killed by SIGKILL; its log: .*server\.log"
        ):
            server.check()
        wait_until(lambda: not marked_processes(server.mark), "engine and worker end with their server")
        server.restart()

    before, killed, after = with_a_fault(ranks, weights, server, tmp_path, f"kill-{server.pid}", look)[0]
    assert isinstance(before, SyncReport)
    assert isinstance(killed, str)
    assert "has the server died?" in killed
    assert isinstance(after, SyncReport), after
    assert fleet.versions() == ["after"]

    async def ask() -> Generation:
        async with TokenClient(server.url) as client:
            return await client.generate([1, 2, 3], Sampling(max_tokens=3), "after")

    assert len(asyncio.run(ask()).token_ids) == 3


def wait_until(true: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


OWNER = """
import sys, time
from pathlib import Path
from megatron_klong.config import ServerConfig
from megatron_klong.inference.server import VllmServer
config = ServerConfig(model=Path(sys.argv[1]), dtype="bfloat16", max_model_len=128)
server = VllmServer(config, Path(sys.argv[2]))
server.start()
print(server.mark, server.url, flush=True)
server.wait_ready()
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def owned(weights: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A process with a bf16 server of its own: (process, mark, url)."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(weights), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    mark, url = owner.stdout.readline().split()
    yield owner, mark, url
    owner.kill()
    owner.wait()
    for pid in marked_processes(mark):
        os.kill(pid, signal.SIGKILL)


BF16_TOLERANCE = 0.15


def test_bf16_agrees_and_no_process_outlives_a_killed_owner(
    ranks: RankPool, weights: Path, owned: tuple[subprocess.Popen[str], str, str]
) -> None:
    owner, mark, url = owned
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    ours = ranks.run(sync_ranks.log_probs, FULL, 4, folder=weights, precision="bf16")[0]
    fleet = Fleet([url])
    differences = [
        abs(a - b)
        for ids, megatron in zip(prompts(), ours)
        for given in (megatron, fleet.score(ids)[0])
        for a, b in zip(given, reference_log_probs(ids))
    ]
    assert 1e-4 < max(differences) < BF16_TOLERANCE
    assert sum(differences) / len(differences) < 0.03

    assert len(marked_processes(mark)) >= 3  # server, engine, worker
    owner.kill()
    wait_until(lambda: not marked_processes(mark), "all processes of the server end with its owner")


def test_no_process_outlives_an_owner_killed_while_the_server_starts(
    owned: tuple[subprocess.Popen[str], str, str],
) -> None:
    owner, mark, _ = owned
    # Killed while the engine's process is new: nothing of ours has run in it yet.
    wait_until(lambda: len(marked_processes(mark)) >= 3, "the engine's process starts", 60)
    owner.kill()
    wait_until(lambda: not marked_processes(mark), "all processes of the server end", 60)


def test_a_server_that_cannot_start_says_why(weights: Path, tmp_path: Path) -> None:
    config = ServerConfig(model=weights, max_model_len=128, extra_args=("--max-model-lenn", "3"))
    server = VllmServer(config, tmp_path / "log")
    server.start()
    with pytest.raises(ServerError, match=r"the vLLM server ended with exit code 2.*; its log: .*log"):
        server.wait_ready()
    server.stop()
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(
        (weights / "config.json").read_text().replace('"head_dim": 32', '"head_dim": 16')
    )
    for change, message in (
        ({"model": small}, "head_dim=16: vLLM's CPU attention needs a multiple of 32"),
        ({"model": tmp_path}, "no config.json there"),
        ({"transfer": "nccl"}, "server.transfer=nccl needs a GPU; use shm on this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            VllmServer(config.model_copy(update=change), tmp_path / "log").start()


LAYOUTS = [
    (FULL, 4, False),
    (FULL, 4, True),
    (ParallelConfig(tensor=2, expert=2), 4, False),
    (ParallelConfig(pipeline=4), 4, True),
    (ParallelConfig(pipeline=2, virtual=2), 2, False),
    (ParallelConfig(expert=4), 4, False),
    (ParallelConfig(), 2, False),
    (ParallelConfig(), 1, True),
]


@pytest.mark.parametrize(("parallel", "world", "everywhere"), LAYOUTS, ids=str)
def test_the_source_gives_the_weights_bit_for_bit_at_any_layout(
    ranks: RankPool, weights: Path, parallel: ParallelConfig, world: int, everywhere: bool
) -> None:
    answers = ranks.run(
        sync_ranks.gathered, parallel, world, folder=weights, parallel=parallel, everywhere=everywhere
    )
    original = load_file(weights / "model.safetensors")
    for rank, answer in enumerate(answers):
        if rank and not everywhere:
            assert answer == 0
            continue
        assert answer.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(answer[name], tensor), name


def test_segments_keep_tensors_of_any_kind_and_refuse_what_does_not_fit() -> None:
    segment = Segment.create(1000)
    other = Segment(segment.path)
    segment.unlink()
    odd = torch.arange(7, dtype=torch.bfloat16)
    slots = [segment.put("odd", odd, 0), segment.put("bias", torch.ones(3), 64)]
    assert torch.equal(other.view("bfloat16", (7,), 0), odd)
    assert [other.checksum(slot.offset, size) for slot, size in zip(slots, (14, 12))] == [
        s.checksum for s in slots
    ]
    other.bytes[13] += 1
    assert segment.checksum(0, 14) != slots[0].checksum
    assert not segment.path.exists()
    with pytest.raises(
        ValueError, match=r"no shared memory of 1,125,899,906,842,624 bytes in /dev/shm.*--shm-size"
    ):
        Segment.create(1 << 50)


def test_a_process_group_gives_every_server_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, sent = Fleet(["http://a", "http://b", "http://c"]), {}
    monkeypatch.setattr(Fleet, "world_sizes", lambda _self: [1, 2, 4])
    monkeypatch.setattr(Fleet, "_post", lambda _self, url, _path, body: sent.update({url: body["init_info"]}))
    fleet.init_weight_transfer_engine({"rank_offset": 1, "world_size": 2, "master_port": 5})
    assert sent == {
        "http://a": {"rank_offset": 1, "world_size": 8, "master_port": 5},
        "http://b": {"rank_offset": 2, "world_size": 8, "master_port": 5},
        "http://c": {"rank_offset": 4, "world_size": 8, "master_port": 5},
    }
