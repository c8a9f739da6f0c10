"""Syncs that fail: what the trainer asks of the servers, and when it gives up."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.config import ParallelConfig, RlConfig, load_config
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.sync import BrokenOffError, SyncError, SyncReport
from megatron_klong.inference.wire import ServerError
from megatron_klong.platform import Platform
from megatron_klong.rl.exchange import Exchange, Finished, ServerAddress
from megatron_klong.rl.roles import stay_until_finished
from megatron_klong.rl.trainer import RlProgress, Serving
from megatron_klong.training.rank_entry import RankError
from tests.ranks import RankPool

ROOT = Path(__file__).parents[1]
FIRST, SECOND = (ServerAddress(url="http://there:1", start=start) for start in ("first", "second"))
PROGRESS = RlProgress(step=3, iteration=2, lineage="run", consumed=())
REPORT = SyncReport("run:2", tensors=1, bytes=8, seconds={}, difference=0.0)


class Sync:
    """In place of a sync: fails as told, then comes through."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)

    def run(self, version: str, probes: object) -> SyncReport:
        if self._failures:
            raise self._failures.pop(0)
        return REPORT


def serve(platform: Platform, folder: Path, failures: list[Exception], seconds: float) -> str:
    config = load_config(RlConfig, ROOT / "examples/quickstart/rl.yaml", [f"trainer.sync_seconds={seconds}"])
    exchange = Exchange(folder)
    exchange.tell("server-0", FIRST)
    source: Any = None
    serving, sync = Serving(config, exchange, source), Sync(*failures)
    made: Any = sync

    def connected() -> Any:
        serving._sync = (FIRST,), made
        # It has been started again while the sync was under way.
        exchange.tell("server-0", SECOND)
        return sync

    serving._connected = connected  # type: ignore[method-assign]
    try:
        return serving.until_served(PROGRESS, []).version
    except RankError as error:
        return f"given up: {error}"


@pytest.mark.parametrize("broken", [False, True])
def test_servers_with_half_an_update_are_started_again(ranks: RankPool, tmp_path: Path, broken: bool) -> None:
    failure = BrokenOffError("half") if broken else SyncError("none")
    (version,) = ranks.run(serve, ParallelConfig(), 1, folder=tmp_path, failures=[failure], seconds=60.0)
    assert version == "run:2"
    exchange = Exchange(tmp_path)
    assert exchange.heard("restart-0", ServerAddress) == (FIRST if broken else None)
    assert exchange.servers(1) == [SECOND]
    exchange.tell("server-0", FIRST)  # who is to be started again is no server
    assert exchange.servers(1) == ([] if broken else [FIRST])


def test_syncs_that_never_come_through_end_the_run(ranks: RankPool, tmp_path: Path) -> None:
    (said,) = ranks.run(
        serve, ParallelConfig(), 1, folder=tmp_path, failures=[ServerError("gone")] * 9, seconds=1.0
    )
    assert said == "given up: gone; no sync has come through in trainer.sync_seconds=1"


class Server:
    """In place of vLLM's process: it lives."""

    url = "http://here:1"

    def __init__(self) -> None:
        self.looks = 0

    def check(self) -> None:
        self.looks += 1


def test_a_server_ends_only_when_it_itself_is_asked(tmp_path: Path) -> None:
    """What was asked of the start before is not meant for this one, though its address is the same."""
    exchange, server = Exchange(tmp_path), Server()
    failed: list[BaseException] = []

    def stay() -> None:
        try:
            stay_until_finished(exchange, 4, server)  # type: ignore[arg-type]
        except ServerError as error:
            failed.append(error)

    exchange.tell("restart-4", ServerAddress(url=server.url, start="before"))
    thread = threading.Thread(target=stay)
    thread.start()
    while server.looks < 2:
        assert thread.is_alive()
    own = exchange.heard("server-4", ServerAddress)
    assert own is not None and not failed
    exchange.tell("restart-4", own)
    thread.join(30)
    assert "an update of its weights broke off" in str(failed[0])
    exchange.tell("finished", Finished())
    stay_until_finished(exchange, 4, server)  # type: ignore[arg-type]


class Versions(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"weight_version": "run:2"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_servers_are_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a node may name one for the world outside."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Versions) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert Fleet([f"http://127.0.0.1:{server.server_port}"]).versions() == ["run:2"]
        finally:
            server.shutdown()
            thread.join()
