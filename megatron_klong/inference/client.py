"""Token-in/token-out client of a vLLM server, for agents and judges. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from megatron_klong.inference.wire import (
    GENERATE,
    Generation,
    RefusedError,
    Sampling,
    ServerError,
    error_text,
    generate_request,
    parse_generation,
    parse_score,
    score_request,
)


class TokenClient:
    """Talks to one server; any number of requests at a time.

    Args:
        url: the server's address, such as ``http://127.0.0.1:8000``.
        timeout_seconds: for one answer.
    """

    def __init__(self, url: str, timeout_seconds: float = 3600.0) -> None:
        self.url = url
        # The server closes what is idle for 5 s; a request that came just then would fail.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(
            base_url=url, timeout=timeout_seconds, limits=unlimited, trust_env=False
        )

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, version: str) -> Generation:
        """Sample an answer from weights ``version``.

        Raises:
            RefusedError: the server will not have this request.
            ServerError: the server failed, or is not there.
            VersionError: other weights made it.
        """
        answer = parse_generation(await self._post(generate_request(prompt_ids, sampling)))
        answer.require_version(version)
        return answer

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-prob of every token but the first, given those before it, at temperature 1."""
        return parse_score(await self._post(score_request(token_ids)), token_ids)

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = await self._http.post(GENERATE, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url}: {type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            kind = RefusedError if response.is_client_error else ServerError
            raise kind(f"{self.url}: {error_text(response.status_code, response.text)}")
        answer: dict[str, Any] = response.json()
        return answer

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> TokenClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
