"""Messages to token ids, once per block; everything downstream slices these ids.

A chat *format* (one per model family) says which text and which control tokens stand for a
message. The :class:`Renderer` joins it to a tokenizer. Control tokens are inserted by id and never
parsed from content, so a message that spells ``<|user|>`` cannot forge a role.

Block by block: the initial messages; then for every turn the *opening* of the assistant message
(context), the *action* (what the model produced, its stop id included) and the *answer block*. An
answer block is rendered without its first token where that token is the action's stop id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from megatron_klong.trajectory.encoder import TextEncoder, text_encoder
from megatron_klong.trajectory.schema import (
    Json,
    Message,
    Trajectory,
    initial_messages,
    turns,
)


class TokenKind(IntEnum):
    """What a token is a part of."""

    TEMPLATE = 0
    """Control tokens, and the fixed words of the chat format."""
    TOOLS = 1
    """Descriptions of tools."""
    SYSTEM = 2
    USER = 3
    TOOL = 4
    """Results of calls."""
    REASONING = 5
    CONTENT = 6
    CALL = 7
    STOP = 8
    """What ends an assistant's message."""


@dataclass(frozen=True)
class Control:
    """A control token, by its spelling in the tokenizer."""

    token: str
    kind: TokenKind = TokenKind.TEMPLATE


@dataclass(frozen=True)
class Text:
    """Text, encoded together with its neighbours."""

    text: str
    kind: TokenKind = TokenKind.TEMPLATE


Piece = Text | Control


@dataclass(frozen=True)
class ParsedAction:
    """What an assistant wrote.

    Attributes:
        message: its content, reasoning and calls; where it is malformed, all of the text as content.
        problem: what is malformed in it, for the one who wrote it; None where all is well.
    """

    message: Message
    problem: str | None = None


class ChatFormat(Protocol):
    """How one model family writes a conversation."""

    @property
    def name(self) -> str: ...

    @property
    def controls(self) -> tuple[str, ...]:
        """Every control token the format uses."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """The control tokens at which generation of an assistant message ends."""
        ...

    def opening(self) -> list[Piece]:
        """What opens an assistant message; the generation prompt."""
        ...

    def initial(self, messages: Sequence[Message], tools: Sequence[Json]) -> list[Piece]:
        """The messages before the first action, with the tool descriptions."""
        ...

    def action(self, message: Message, *, last: bool) -> list[Piece]:
        """What the assistant produces, without its stop token; ``last`` of the conversation."""
        ...

    def parse(self, text: str, tools: Sequence[Json]) -> ParsedAction:
        """The inverse of :meth:`action`: what an assistant wrote, as a message.

        Args:
            text: without its stop token.
            tools: descriptions of the tools; an argument that is no string there is read as JSON.
        """
        ...

    def stop(self, answer: Sequence[Message]) -> Control:
        """The stop token that ends an action which ``answer`` follows (empty at the end)."""
        ...

    def answer(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole answer block, from the token after the action (its stop token where shared)."""
        ...

    def aside(self, text: str) -> list[Piece]:
        """A message of the environment, such as the marker for omitted turns."""
        ...


@dataclass(frozen=True)
class Block:
    """Token ids, and what each is a part of (:class:`TokenKind` as bytes)."""

    ids: tuple[int, ...]
    kinds: bytes = b""

    def __add__(self, other: Block) -> Block:
        return Block(self.ids + other.ids, self.kinds + other.kinds)


@dataclass(frozen=True)
class RenderedTurn:
    """One turn.

    Attributes:
        action: opening and action; the first ``len(opening_ids)`` tokens are context.
        answer: the answer block, empty where nothing answers.
    """

    action: Block
    answer: Block

    @property
    def action_ids(self) -> tuple[int, ...]:
        """Ids of opening and action."""
        return self.action.ids

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Ids of the answer block."""
        return self.answer.ids


@dataclass(frozen=True)
class RenderedTrajectory:
    """A whole trajectory, in blocks."""

    initial: Block
    turns: tuple[RenderedTurn, ...]

    @property
    def initial_ids(self) -> tuple[int, ...]:
        """Ids of the messages before the first action."""
        return self.initial.ids


class Renderer:
    """A chat format with a tokenizer."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tokenizer: Tokenizer,
        fingerprint: str,
        make_encoder: Callable[[Tokenizer], TextEncoder] = text_encoder,
    ) -> None:
        """Raises ValueError where the tokenizer lacks a control token of the format."""
        self.format = chat_format
        self.fingerprint = fingerprint
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._tokenizer = tokenizer
        # Control tokens come in by id only; their spelling inside content is ordinary text.
        self._encoder = make_encoder(tokenizer)
        self._control_ids = {token: self._control_id(token) for token in chat_format.controls}
        self.opening_ids = self.encode(chat_format.opening())
        self.stop_ids = tuple(self._control_ids[token] for token in chat_format.stops)

    def _control_id(self, token: str) -> int:
        token_id: int | None = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"tokenizer: has no token {token!r}, which the {self.format.name} format needs; "
                "use the tokenizer of a model of that family"
            )
        return token_id

    def encode(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        """Token ids of pieces; neighbouring texts are encoded as one."""
        return self.encode_block(pieces).ids

    def encode_block(self, pieces: Sequence[Piece]) -> Block:
        """Token ids of pieces with what each is a part of: that of its first letter."""
        ids: list[int] = []
        kinds = bytearray()
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, Text)):
            if is_text:
                texts = [piece for piece in group if isinstance(piece, Text) and piece.text]
                encoded, of_each = self._encode_texts(texts)
                ids += encoded
                kinds += of_each
                continue
            for piece in group:
                assert isinstance(piece, Control)
                ids.append(self._control_ids[piece.token])
                kinds.append(piece.kind)
        return Block(tuple(ids), bytes(kinds))

    def _encode_texts(self, texts: Sequence[Text]) -> tuple[list[int], bytes]:
        if not texts:
            return [], b""
        whole = "".join(text.text for text in texts)
        if len({text.kind for text in texts}) == 1:
            ids = self._encoder.encode(whole).tolist()
            return ids, bytes([texts[0].kind]) * len(ids)
        encoded, starts = self._encoder.encode_with_starts(whole)
        ends = np.cumsum([len(text.text.encode()) for text in texts])
        places = np.minimum(np.searchsorted(ends, starts, side="right"), len(texts) - 1)
        kinds = np.array([text.kind for text in texts], dtype=np.uint8)
        return encoded.tolist(), kinds[places].tobytes()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids with control tokens spelled out, for people."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def marker(self, text: str) -> tuple[int, ...]:
        """Ids of the message that stands where turns are omitted."""
        return self.encode(self.format.aside(text))

    def note(self, text: str) -> tuple[int, ...]:
        """Ids of the text that stands where a block was cut."""
        return self.encode([Text(text)])

    def render(self, trajectory: Trajectory) -> RenderedTrajectory:
        """Render every block of a trajectory once."""
        parts = turns(trajectory.messages)
        opening = self.encode_block(self.format.opening())
        rendered: list[RenderedTurn] = []
        for number, turn in enumerate(parts):
            ends = number == len(parts) - 1 and not turn.answer
            pieces = self.format.action(turn.action, last=ends)
            if not turn.action.cut:
                pieces = [*pieces, replace(self.format.stop(turn.answer), kind=TokenKind.STOP)]
            action = opening + self.encode_block(pieces)
            answer = Block(()) if ends else self._answer(turn.answer, action.ids)
            rendered.append(RenderedTurn(action, answer))
        messages = initial_messages(trajectory.messages)
        initial = self.encode_block(self.format.initial(messages, trajectory.tools))
        return RenderedTrajectory(initial, tuple(rendered))

    def initial_ids(self, messages: Sequence[Message], tools: Sequence[Json]) -> tuple[int, ...]:
        """Ids of the messages before the first action."""
        return self.encode(self.format.initial(messages, tools))

    def answer_ids(self, messages: Sequence[Message], action_ids: Sequence[int]) -> tuple[int, ...]:
        """Ids of what answers an action; without its first token where the action ends with that."""
        return self._answer(messages, action_ids).ids

    def _answer(self, messages: Sequence[Message], action_ids: Sequence[int]) -> Block:
        block = self.encode_block(self.format.answer(messages))
        shared = block.ids[:1] == tuple(action_ids[-1:]) and block.ids[0] in self.stop_ids
        return Block(block.ids[1:], block.kinds[1:]) if shared else block

    def parse_action(self, ids: Sequence[int], tools: Sequence[Json]) -> ParsedAction:
        """The message that sampled ids (the opening left out) stand for."""
        text = self.decode(ids[:-1] if ids[-1:] and ids[-1] in self.stop_ids else ids)
        return self.format.parse(text, tools)


def load_renderer(
    name: str, tokenizer: Path, make_encoder: Callable[[Tokenizer], TextEncoder] = text_encoder
) -> Renderer:
    """The renderer of a family with a ``tokenizer.json``, or that of a folder.

    Raises:
        ValueError: no such renderer, no such file, or a tokenizer of another family.
    """
    from megatron_klong.trajectory.formats import chat_format

    family = chat_format(name)
    file = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"tokenizer: no tokenizer.json in {tokenizer}")
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise ValueError(f"tokenizer: {file} cannot be read: {error}") from error
    return Renderer(family, loaded, hashlib.sha256(file.read_bytes()).hexdigest(), make_encoder)
