"""What families that write their calls in ``<tool_call>`` tags have in common when read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_klong.trajectory.formats.reasoning import split_reasoning
from megatron_klong.trajectory.render import ParsedAction
from megatron_klong.trajectory.schema import Json, Message, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def parse_action(text: str, parse_call: Callable[[str], ToolCall | str]) -> ParsedAction:
    """Reasoning, content and calls of an assistant's text.

    Args:
        text: without its stop token.
        parse_call: reads what stands between the tags of one call; says what is wrong with it.
    """
    whole = Message("assistant", text)
    reasoning, rest = split_reasoning(whole)
    content, *calls = rest.split(_OPEN)
    parsed: list[ToolCall] = []
    for number, call in enumerate(calls, 1):
        inside, closed, after = call.partition(_CLOSE)
        if not closed:
            return ParsedAction(whole, f"call {number} has no {_CLOSE}")
        if after.strip():
            return ParsedAction(whole, f"text follows call {number}; calls come last")
        result = parse_call(inside)
        if isinstance(result, ToolCall) and not _encodable(result):
            result = "its arguments hold what is no text or no number of JSON"
        if isinstance(result, str):
            return ParsedAction(whole, f"call {number}: {result}")
        parsed.append(result)
    if _CLOSE in content:
        return ParsedAction(whole, f"{_CLOSE} without {_OPEN}")
    message = replace(
        whole, content=content.strip() or None, reasoning_content=reasoning.strip() or None,
        tool_calls=tuple(parsed),
    )  # fmt: skip
    return ParsedAction(message)


def _encodable(call: ToolCall) -> bool:
    """Whether a call can be kept: no half of a surrogate pair, no NaN, nothing nested beyond reason."""
    try:
        json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def argument_type(tools: Sequence[Json], tool: str, argument: str) -> str | None:
    """The JSON schema type of a tool's argument, where the descriptions name one."""
    for described in tools:
        function = described.get("function", described)
        if function.get("name") == tool:
            kind = function.get("parameters", {}).get("properties", {}).get(argument, {}).get("type")
            return kind if isinstance(kind, str) else None
    return None


def typed_argument(text: str, kind: str | None) -> Any:
    """A value that is written as text: as it is where a string is wanted, else as JSON if it is that."""
    if kind in (None, "string"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
