"""What goes over the wire to a vLLM server and comes back: records and their JSON. No torch here.

The route is vLLM's token-in/token-out ``/inference/v1/generate`` (``--enable-scale-out``): prompts
and answers are token ids, each answer says which weight version made which of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GENERATE = "/inference/v1/generate"


class ServerError(RuntimeError):
    """A server refused, failed, or is not there; the message names it and what it said."""


class RefusedError(ServerError):
    """A server refused the request as such; it would refuse it again."""


class VersionError(ServerError):
    """An answer was not made by the weights it was asked of."""


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: logits are divided by it; the log-probs returned are those after it.
        stop_token_ids: tokens that end the answer; they stay in it.
        seed: makes the answer repeatable on the same server.
        return_prompt: have the server say which prompt it saw.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    return_prompt: bool = False


@dataclass(frozen=True)
class VersionSpan:
    """Tokens ``start`` to ``end`` (exclusive) of an answer were made by weights ``version``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: as sampled, the stop token included.
        log_probs: of each token under the distribution it was sampled from (after temperature).
        finish_reason: ``stop``, ``length``, or ``abort`` when the server was paused meanwhile.
        versions: which weights made which tokens.
        cached_tokens: prompt tokens whose keys and values were in the server's cache.
        prompt_ids: the prompt that the server saw; None where it was not asked to say.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    versions: tuple[VersionSpan, ...]
    cached_tokens: int
    prompt_ids: tuple[int, ...] | None = None

    def require_version(self, version: str) -> None:
        """Refuse an answer of which any token comes from other weights (VersionError)."""
        if self.token_ids and {span.version for span in self.versions} != {version}:
            spans = ", ".join(f"{s.start}..{s.end} by {s.version!r}" for s in self.versions)
            raise VersionError(f"an answer was asked of weights {version!r}, its tokens are {spans}")


def generate_request(prompt_ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """The body of a generation request."""
    return {
        "token_ids": list(prompt_ids),
        "return_token_ids": sampling.return_prompt,
        "sampling_params": {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_token_ids),
            "seed": sampling.seed,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def parse_generation(body: dict[str, Any]) -> Generation:
    """The answer in a generation response."""
    (choice,) = body["choices"]
    details = body["usage"]["prompt_tokens_details"] or {}
    return Generation(
        token_ids=tuple(choice["token_ids"]),
        log_probs=tuple(float(token["logprob"]) for token in choice["logprobs"]["content"]),
        finish_reason=choice["finish_reason"],
        versions=tuple(VersionSpan(**span) for span in choice["weight_versions"] or ()),
        cached_tokens=int(details.get("cached_tokens") or 0),
        prompt_ids=None if body.get("prompt_token_ids") is None else tuple(body["prompt_token_ids"]),
    )


def score_request(token_ids: Sequence[int]) -> dict[str, Any]:
    """The body of a request for the log-probs of given tokens. It does not read the prefix cache."""
    return {
        "token_ids": list(token_ids),
        "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
    }


def parse_score(body: dict[str, Any], token_ids: Sequence[int]) -> tuple[float, ...]:
    """Log-prob of every token but the first, given those before it."""
    given = zip(body["prompt_logprobs"][1:], token_ids[1:], strict=True)
    return tuple(float(token[str(token_id)]["logprob"]) for token, token_id in given)


def next_token_request(prompt_ids: Sequence[int], token_id: int) -> dict[str, Any]:
    """The body of a request for the log-prob of one token after a prompt. It reads the prefix cache.

    The answer lists as many log-probs as are asked for, and the sampled token's first: so two are
    asked for, to be sure of one.
    """
    asked = [token_id, token_id - 1 if token_id else 1]
    return {
        "token_ids": list(prompt_ids),
        "sampling_params": {
            "max_tokens": 1, "logprobs": 2, "logprob_token_ids": asked, "detokenize": False,
        },
    }  # fmt: skip


def parse_next_token(body: dict[str, Any], token_id: int) -> float:
    """That token's log-prob."""
    (choice,) = body["choices"]
    (position,) = choice["logprobs"]["content"]
    found = {entry["token_id"]: entry["logprob"] for entry in position["top_logprobs"]}
    return float(found[token_id])


def error_text(status: int, text: str) -> str:
    """What an error response says, on one line."""
    return f"HTTP {status}: {' '.join(text.split())[:500]}"
