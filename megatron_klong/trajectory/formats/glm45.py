"""The chat format of GLM-4.5 (and 4.6).

An assistant message has no end token of its own: the model stops by producing the token that
opens what follows, ``<|observation|>`` before tool results and ``<|user|>`` otherwise. All
reasoning is kept, also before the last user message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_klong.trajectory.formats.parsing import argument_type, parse_action, typed_argument
from megatron_klong.trajectory.formats.reasoning import split_reasoning
from megatron_klong.trajectory.render import Control, ParsedAction, Piece, Text, TokenKind
from megatron_klong.trajectory.schema import Json, Message, ToolCall

_USER, _SYSTEM = Control("<|user|>"), Control("<|system|>")
_OBSERVATION, _ASSISTANT = Control("<|observation|>"), Control("<|assistant|>")

_TOOLS_BEFORE = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_TOOLS_AFTER = """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""


class Glm45Format:
    """See the module's text."""

    name = "glm-4.5"
    controls = (
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|endoftext|>",
    )
    stops = ("<|observation|>", "<|user|>", "<|endoftext|>")

    def opening(self) -> list[Piece]:
        return [_ASSISTANT]

    def initial(self, messages: Sequence[Message], tools: Sequence[Json]) -> list[Piece]:
        pieces: list[Piece] = [Control("[gMASK]"), Control("<sop>")]
        if tools:
            described = "".join(f"{_json(tool)}\n" for tool in tools)
            pieces += [_SYSTEM, Text(_TOOLS_BEFORE), Text(described, TokenKind.TOOLS), Text(_TOOLS_AFTER)]
        return pieces + self.answer(messages)

    def action(self, message: Message, *, last: bool) -> list[Piece]:
        reasoning, content = split_reasoning(message)
        pieces: list[Piece] = [Text(f"\n<think>{reasoning.strip()}</think>", TokenKind.REASONING)]
        if content.strip():
            pieces.append(Text("\n" + content.strip(), TokenKind.CONTENT))
        return [*pieces, *(Text(_call(call), TokenKind.CALL) for call in message.tool_calls)]

    def parse(self, text: str, tools: Sequence[Json]) -> ParsedAction:
        return parse_action(text, partial(_parse_call, tools=tools))

    def stop(self, answer: Sequence[Message]) -> Control:
        return _OBSERVATION if answer and answer[0].role == "tool" else _USER

    def answer(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        previous = None
        for message in messages:
            if message.role == "tool":
                if previous != "tool":
                    pieces.append(_OBSERVATION)
                text = f"\n<tool_response>\n{message.content or ''}\n</tool_response>"
                pieces.append(Text(text, TokenKind.TOOL))
            else:
                kind = TokenKind.SYSTEM if message.role == "system" else TokenKind.USER
                pieces += [Control(f"<|{message.role}|>"), Text("\n" + (message.content or ""), kind)]
            previous = message.role
        return pieces

    def aside(self, text: str) -> list[Piece]:
        return [_USER, Text("\n" + text)]


def _call(call: ToolCall) -> str:
    arguments = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else _json(value)}"
        "</arg_value>\n"
        for key, value in call.arguments.items()
    )
    return f"\n<tool_call>{call.name}\n{arguments}</tool_call>"


_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _parse_call(text: str, tools: Sequence[Json]) -> ToolCall | str:
    """One call, without its tags; or what is wrong with it."""
    place = text.find("<arg_key>") if "<arg_key>" in text else len(text)
    name = text[:place].strip()
    if not name or "\n" in name:
        return "a call without the name of a tool"
    arguments: Json = {}
    while match := _ARGUMENT.match(text, place):
        key, value = match[1].strip(), match[2]
        if key in arguments:
            return f"argument {key!r} of {name} is given twice"
        arguments[key] = typed_argument(value, argument_type(tools, name, key))
        place = match.end()
    if text[place:].strip():
        return f"the arguments of {name} are not pairs of <arg_key> and <arg_value>"
    return ToolCall(name, arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
