"""How an over-long block is shortened: the one rule for live rollouts and imported data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What stays of a block: ``head`` tokens, a note, ``tail`` tokens. No note where ``whole``."""

    head: int
    tail: int
    whole: bool


def truncate(length: int, cap: int, note: int) -> Kept:
    """Keep at most ``cap`` tokens of ``length``: head and tail, the note of ``note`` tokens between.

    The head gets the odd token. The result with its note is exactly ``cap`` long when anything
    was cut.
    """
    assert 0 <= note < cap
    if length <= cap:
        return Kept(head=length, tail=0, whole=True)
    tail = (cap - note) // 2
    return Kept(head=cap - note - tail, tail=tail, whole=False)


def truncate_ids(ids: Sequence[int], cap: int, note_ids: Sequence[int]) -> tuple[int, ...]:
    """A block of token ids, shortened by :func:`truncate`."""
    kept = truncate(len(ids), cap, len(note_ids))
    if kept.whole:
        return tuple(ids)
    return (*ids[: kept.head], *note_ids, *ids[len(ids) - kept.tail :])
