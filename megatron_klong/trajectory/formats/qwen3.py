"""The chat format of Qwen3.

Every message ends with ``<|im_end|>``; consecutive tool results share one user message. All
reasoning is kept, also before the last user message. A message without reasoning has no think
block, except the last one of the conversation, which gets an empty one, as in the published
template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from megatron_klong.trajectory.formats.parsing import parse_action
from megatron_klong.trajectory.formats.reasoning import split_reasoning
from megatron_klong.trajectory.render import Control, ParsedAction, Piece, Text, TokenKind
from megatron_klong.trajectory.schema import Json, Message, ToolCall

_START, _END = Control("<|im_start|>"), Control("<|im_end|>")

_TOOLS_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


class Qwen3Format:
    """See the module's text."""

    name = "qwen3"
    controls = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    stops = ("<|im_end|>", "<|endoftext|>")

    def opening(self) -> list[Piece]:
        return [_START, Text("assistant\n")]

    def initial(self, messages: Sequence[Message], tools: Sequence[Json]) -> list[Piece]:
        if not tools:
            return self._messages(messages)
        system, rest = "", messages
        if messages and messages[0].role == "system":
            system, rest = f"{messages[0].content or ''}\n\n", messages[1:]
        described = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        header = [
            Text("system\n"), Text(system, TokenKind.SYSTEM), Text(_TOOLS_BEFORE),
            Text(described, TokenKind.TOOLS), Text(_TOOLS_AFTER),
        ]  # fmt: skip
        return [_START, *header, _END, Text("\n"), *self._messages(rest)]

    def action(self, message: Message, *, last: bool) -> list[Piece]:
        reasoning, content = split_reasoning(message)
        pieces: list[Piece] = []
        if reasoning or last:
            thought = reasoning.strip("\n")
            pieces.append(Text(f"<think>\n{thought}\n</think>\n\n", TokenKind.REASONING))
        pieces.append(Text(content.lstrip("\n") if pieces else content, TokenKind.CONTENT))
        for number, call in enumerate(message.tool_calls):
            between = "\n" if number or content else ""  # one feed, though the content may have been feeds
            pieces.append(Text(between + _call(call), TokenKind.CALL))
        return pieces

    def parse(self, text: str, tools: Sequence[Json]) -> ParsedAction:
        return parse_action(text, _parse_call)

    def stop(self, answer: Sequence[Message]) -> Control:
        return _END

    def answer(self, messages: Sequence[Message]) -> list[Piece]:
        # The line feed after <|im_end|> is the template's, not the model's.
        return [_END, Text("\n"), *self._messages(messages)]

    def aside(self, text: str) -> list[Piece]:
        return _message("user", text)

    def _messages(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for is_tool, group in groupby(messages, key=lambda message: message.role == "tool"):
            if is_tool:
                results = (f"\n<tool_response>\n{result.content or ''}\n</tool_response>" for result in group)
                pieces += [_START, Text("user"), Text("".join(results), TokenKind.TOOL), _END, Text("\n")]
            else:
                for message in group:
                    kind = TokenKind.SYSTEM if message.role == "system" else TokenKind.USER
                    pieces += _message(message.role, message.content or "", kind)
        return pieces


def _message(role: str, text: str, kind: TokenKind = TokenKind.TEMPLATE) -> list[Piece]:
    return [_START, Text(f"{role}\n"), Text(text, kind), _END, Text("\n")]


def _call(call: ToolCall) -> str:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>'


def _parse_call(text: str) -> ToolCall | str:
    """One call, without its tags; or what is wrong with it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return 'not {"name": ..., "arguments": {...}}'
    arguments = value.get("arguments", {})
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else "arguments is no object"
