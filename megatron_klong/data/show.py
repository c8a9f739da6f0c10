"""One trajectory's windows in full, so that anyone can recount them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_klong.config import WindowConfig
from megatron_klong.data.header import window_rule
from megatron_klong.data.report import assistant_tokens
from megatron_klong.data.store import TokenStore
from megatron_klong.data.windows import SpanKind, WindowAssembler, split_store
from megatron_klong.trajectory.render import Renderer
from megatron_klong.window import REASONS

_EXCERPT_TOKENS = 24
_EXCERPT_CHARACTERS = 32


@dataclass(frozen=True)
class SpanView:
    """A stretch of a window: ``length`` tokens, ``start`` to ``stop`` of the trajectory (both None
    for inserted tokens), and how it begins and ends as text."""

    kind: str
    turn: int | None
    start: int | None
    stop: int | None
    length: int
    trained: int
    text: str


@dataclass(frozen=True)
class WindowView:
    """One window: its stretches, token ids and loss mask (1 where the token is a target)."""

    window: int
    tokens: int
    trained_tokens: int
    spans: tuple[SpanView, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class TrajectoryView:
    """A trajectory and its windows; ``not_trained`` maps turn numbers to reasons."""

    id: str
    tokens: int
    turns: int
    assistant_tokens: int
    windows: tuple[WindowView, ...]
    not_trained: dict[int, str]


def show_trajectory(store: TokenStore, trajectory_id: str, config: WindowConfig) -> TrajectoryView:
    """Split one trajectory and lay its windows open.

    Raises:
        ValueError: no such id, or impossible window settings.
    """
    number = store.find(trajectory_id)
    trajectory = store.trajectory(number)
    renderer = store.renderer()
    rule = window_rule(config, store.header)
    assembler = WindowAssembler(rule, store.header)
    split = split_store(store, rule, config, np.array([number]))
    windows: list[WindowView] = []
    for window in map(split.table.window, range(len(split.table))):
        sample = assembler.sample(window, trajectory, number)
        spans: list[SpanView] = []
        offset = 0
        for span in assembler.spans(window, trajectory.bounds):
            length = assembler.span_length(span)
            inserted = span.kind in (SpanKind.MARKER, SpanKind.NOTE)
            spans.append(
                SpanView(
                    kind=span.kind.value,
                    turn=span.turn,
                    start=None if inserted else span.start,
                    stop=None if inserted else span.stop,
                    length=length,
                    trained=int(sample.loss_mask_T[offset : offset + length].sum()),
                    text=_excerpt(renderer, sample.tokens_T[offset : offset + length].tolist()),
                )
            )
            offset += length
        windows.append(
            WindowView(
                window=window.context.window,
                tokens=window.tokens,
                trained_tokens=int(sample.loss_mask_T.sum()),
                spans=tuple(spans),
                token_ids=tuple(sample.tokens_T.tolist()),
                loss_mask=tuple(sample.loss_mask_T.astype(int).tolist()),
            )
        )
    return TrajectoryView(
        id=trajectory_id,
        tokens=len(trajectory.tokens),
        turns=len(split.table.reasons),
        assistant_tokens=int(assistant_tokens(trajectory, len(store.header.opening_ids)).sum()),
        windows=tuple(windows),
        not_trained={
            turn: str(REASONS[code]) for turn, code in enumerate(split.table.reasons.tolist()) if code
        },
    )


def _excerpt(renderer: Renderer, ids: list[int]) -> str:
    """How tokens begin and end, on one line."""
    if len(ids) <= 2 * _EXCERPT_TOKENS:
        text = repr(renderer.decode(ids))[1:-1]
        if len(text) <= 2 * _EXCERPT_CHARACTERS:
            return text
        return f"{text[:_EXCERPT_CHARACTERS]} ... {text[-_EXCERPT_CHARACTERS:]}"
    first, last = (
        repr(renderer.decode(part))[1:-1] for part in (ids[:_EXCERPT_TOKENS], ids[-_EXCERPT_TOKENS:])
    )
    return f"{first[:_EXCERPT_CHARACTERS]} ... {last[-_EXCERPT_CHARACTERS:]}"
