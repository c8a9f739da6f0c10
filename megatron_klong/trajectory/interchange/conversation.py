"""From what a reader found to a trajectory: the rules that hold for every format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.schema import Json, Message, Trajectory


@dataclass(frozen=True)
class Draft:
    """What a reader found in a record, not checked yet.

    Attributes:
        id: None where the record has none; it gets one by its place.
        origins: where each message stands in the record, for errors; default ``messages.N``.
    """

    messages: tuple[Message, ...]
    id: str | None = None
    tools: tuple[Json, ...] = ()
    task_id: str | None = None
    reward: float | None = None
    prefix_messages: int | None = None
    metadata: Json = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    def origin(self, number: int) -> str:
        """Where a message stands in the record."""
        return self.origins[number] if self.origins else f"messages.{number}"


@dataclass
class EventConversation:
    """What has been made so far of a harness's list of events; for formats that have no list of messages."""

    messages: list[Message] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)
    unseen: list[Json] = field(default_factory=list)
    """Events that no model sees."""

    def say(self, message: Message, origin: str) -> None:
        """The next message, and where it stands in the record."""
        self.messages.append(message)
        self.origins.append(origin)

    def draft(self, *, task_id: str | None = None, metadata: Json) -> Draft:
        """All of it; the unseen events are kept in ``metadata.events``."""
        unseen = {"events": self.unseen} if self.unseen else {}
        return Draft(
            tuple(self.messages), tools=tuple(self.tools), task_id=task_id, metadata={**metadata, **unseen},
            origins=tuple(self.origins),
        )  # fmt: skip


def check_draft(draft: Draft, default_id: str) -> Trajectory:
    """The trajectory, if it is a conversation that can be trained on.

    Raises:
        FieldError: no message or no assistant's; an assistant's without anything in it; calls of a
            message with one id; a call by another role; a result without its call; a mark inside a block;
            or something that JSON in UTF-8 cannot hold.
    """
    _check_messages(draft)
    _check_mark(draft)
    trajectory = Trajectory(
        id=default_id if draft.id is None else draft.id,
        messages=draft.messages,
        tools=draft.tools,
        task_id=draft.task_id,
        reward=draft.reward,
        prefix_messages=draft.prefix_messages,
        metadata=draft.metadata,
    )
    _check_encodable(trajectory)
    return trajectory


def _check_messages(draft: Draft) -> None:
    if not any(message.role == "assistant" for message in draft.messages):
        raise FieldError("messages", "no assistant message" if draft.messages else "no message at all")
    open_calls: set[str | None] = set()
    for number, message in enumerate(draft.messages):
        where = draft.origin(number)
        if message.role == "assistant":
            if not (message.content or message.reasoning_content or message.tool_calls):
                raise FieldError(where, "an assistant message without content, reasoning or calls")
            open_calls = _call_ids(message, where)
        elif message.tool_calls:
            raise FieldError(f"{where}.tool_calls", "only an assistant message may call tools")
        if message.role == "tool" and message.tool_call_id not in open_calls:
            raise FieldError(
                f"{where}.tool_call_id",
                f"{message.tool_call_id!r} answers no call of the assistant message before it",
            )


def _call_ids(message: Message, where: str) -> set[str | None]:
    """The ids of a message's calls; a lone call may have none, and its result then neither."""
    ids = [call.id for call in message.tool_calls]
    for number, call_id in enumerate(ids):
        if call_id in ids[:number]:
            raise FieldError(f"{where}.tool_calls.{number}.id", f"{call_id!r} is used twice")
    return set(ids)


def _check_mark(draft: Draft) -> None:
    """The prefix rule `marked` pins whole blocks: the initial messages and whole turns."""
    mark, count = draft.prefix_messages, len(draft.messages)
    if mark is None or mark == count or (mark < count and draft.messages[mark].role == "assistant"):
        return
    raise FieldError(
        "prefix_messages",
        f"{mark} must end the initial messages or a whole turn: the message after it is to be an "
        f"assistant's, or it is all {count}",
    )


def _check_encodable(trajectory: Trajectory) -> None:
    def as_is(value: object) -> object:
        return vars(value)  # the records of the schema

    try:
        json.dumps(trajectory, default=as_is, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise FieldError("", "has half of a surrogate pair or a number that JSON cannot hold") from None
