"""The control side of one or several vLLM servers that are to serve the same weights. No torch here.

Implements vLLM's ``VLLMWeightSyncClient`` for all servers at once, and what a sync needs around it:
pause, resume, version tags, cache reset, probe requests.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from megatron_klong.inference.wire import (
    GENERATE,
    ServerError,
    VersionSpan,
    error_text,
    next_token_request,
    parse_next_token,
    parse_score,
    score_request,
)

FRESH = "default"
"""The weight version of a server that has just started."""

Result = TypeVar("Result")


class Fleet:
    """Servers by URL; every call goes to all of them at once and returns when all have answered.

    Args:
        urls: addresses, such as ``http://127.0.0.1:8000``.
        timeout_seconds: for one call.

    All methods raise :class:`ServerError`, which names the server and what it said.
    """

    def __init__(self, urls: Sequence[str], timeout_seconds: float = 600.0) -> None:
        if not urls:
            raise ValueError("inference.servers: name at least one server")
        self.urls = tuple(urls)
        # A connection for each call: a server closes one after an error, and a later call would fail.
        unkept = httpx.Limits(max_keepalive_connections=0)
        # Nor by a proxy that the environment has for the world outside.
        self._http = httpx.Client(timeout=timeout_seconds, limits=unkept, trust_env=False)
        self._threads = ThreadPoolExecutor(max_workers=len(urls))

    # vLLM's VLLMWeightSyncClient

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the servers join the transfer; of a process group, each gets ranks of its own."""
        infos = [init_info] * len(self.urls)
        if "rank_offset" in init_info:
            sizes = self.world_sizes()
            offsets = [init_info["rank_offset"] + sum(sizes[:number]) for number in range(len(sizes))]
            infos = [init_info | {"rank_offset": o, "world_size": 1 + sum(sizes)} for o in offsets]
        bodies = dict(zip(self.urls, ({"init_info": info} for info in infos)))
        self._all(lambda url: self._post(url, "/init_weight_transfer_engine", bodies[url]))

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._all(lambda url: self._post(url, "/start_weight_update"))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Hand over one chunk, or where it is."""
        infos = update_info if isinstance(update_info, list) else [update_info]
        body = [_jsonable(info) for info in infos]
        payload = {"update_info": body if isinstance(update_info, list) else body[0]}
        self._all(lambda url: self._post(url, "/update_weights", payload))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update."""
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._all(lambda url: self._post(url, "/finish_weight_update", body))

    # Around it

    def pause(self) -> None:
        """Stop generating; what is under way ends with ``abort``, what comes later waits."""
        self._all(lambda url: self._post(url, "/pause?mode=abort&clear_cache=false"))

    def resume(self) -> None:
        """Generate again."""
        self._all(lambda url: self._post(url, "/resume"))

    def set_version(self, version: str) -> None:
        """Tag the tokens generated from now on."""
        self._all(lambda url: self._post(url, "/update_weight_version", {"new_version": version}))

    def versions(self) -> list[str]:
        """The tag that each server has."""
        return self._all(lambda url: str(self._get(url, "/weight_info")["weight_version"]))

    def world_sizes(self) -> list[int]:
        """Workers of each server."""
        return self._all(lambda url: int(self._get(url, "/get_world_size")["world_size"]))

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values; they belong to the weights before.

        Raises:
            ServerError: the server kept some. It says so in the body of an answer that is 200.
        """

        def reset(url: str) -> None:
            if not self._post(url, "/reset_prefix_cache?reset_running_requests=true").get("success"):
                raise ServerError(f"{url}: did not clear its prefix cache (success: false)")

        self._all(reset)

    def score(self, token_ids: Sequence[int]) -> list[tuple[float, ...]]:
        """Log-prob of every token but the first, by each server; past its prefix cache."""
        body = score_request(token_ids)
        return self._all(lambda url: parse_score(self._post(url, GENERATE, body), token_ids))

    def next_token(
        self, prompt_ids: Sequence[int], token_id: int
    ) -> list[tuple[float, int, tuple[VersionSpan, ...]]]:
        """Log-prob of one token after a prompt, through the prefix cache, by each server.

        Returns:
            For each server: log-prob, prompt tokens it took from its cache, who made the answer.
        """
        body = next_token_request(prompt_ids, token_id)

        def ask(url: str) -> tuple[float, int, tuple[VersionSpan, ...]]:
            answer = self._post(url, GENERATE, body)
            details = answer["usage"]["prompt_tokens_details"] or {}
            spans = answer["choices"][0]["weight_versions"] or ()
            return (
                parse_next_token(answer, token_id),
                int(details.get("cached_tokens") or 0),
                tuple(VersionSpan(**span) for span in spans),
            )

        return self._all(ask)

    def close(self) -> None:
        """Close connections and threads."""
        self._threads.shutdown(wait=False)
        self._http.close()

    def _all(self, call: Callable[[str], Result]) -> list[Result]:
        futures = [self._threads.submit(call, url) for url in self.urls]
        wait(futures)  # also where one has failed: none may still be at work when we return
        return [future.result() for future in futures]

    def _post(self, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._request("POST", url, path, body)

    def _get(self, url: str, path: str) -> dict[str, Any]:
        return self._request("GET", url, path, None)

    def _request(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        what = f"{url}{path.partition('?')[0]}"
        try:
            response = self._http.request(method, f"{url}{path}", json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{what}: {type(error).__name__}: {error}; has the server died?") from error
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"{what}: {error_text(response.status_code, response.text)}")
        answer: dict[str, Any] = response.json()
        return answer


def _jsonable(info: dict[str, Any]) -> dict[str, Any]:
    """Handles of GPU memory are no JSON: vLLM takes them pickled, from where it trusts the sender."""
    if info.get("ipc_handles") is None:
        return {key: value for key, value in info.items() if key != "ipc_handles"}
    pickled = base64.b64encode(pickle.dumps(info["ipc_handles"])).decode()
    return {
        **{key: value for key, value in info.items() if key != "ipc_handles"},
        "ipc_handles_pickled": pickled,
    }
