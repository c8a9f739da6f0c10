"""Reasoning that a harness left inside the content, as both families' templates find it."""

from __future__ import annotations

from megatron_klong.trajectory.schema import Message


def split_reasoning(message: Message) -> tuple[str, str]:
    """``(reasoning, content)`` of an assistant message.

    A separate ``reasoning_content`` is taken as it is; otherwise text in ``<think>`` tags at the
    start of the content counts as reasoning.
    """
    content = message.content or ""
    if message.reasoning_content is not None:
        return message.reasoning_content, content
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>")[0], content.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")
