"""What splitting did to a store: every assistant token accounted for, by recounting masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_klong.config import WindowConfig
from megatron_klong.data.blocks import StoredTrajectory
from megatron_klong.data.header import window_rule
from megatron_klong.data.packing import minimum_rows, pack_rows
from megatron_klong.data.store import TokenStore
from megatron_klong.data.windows import SpanKind, WindowAssembler, split_trajectory
from megatron_klong.window import NotTrained, Split, Window


@dataclass(frozen=True)
class PackingReport:
    """Rows of packed windows.

    Attributes:
        row_tokens: R.
        rows: that best fit needs.
        rows_at_least: lower bound for any packing (L2).
        efficiency: tokens / (rows x R).
        efficiency_at_most: tokens / (rows_at_least x R).
    """

    row_tokens: int
    rows: int
    rows_at_least: int
    efficiency: float
    efficiency_at_most: float


@dataclass(frozen=True)
class SplitReport:
    """One window setting over one store.

    Attributes:
        trajectories, windows: how many.
        windows_per_trajectory_max: of the trajectory with most.
        assistant_tokens: all that assistants produced, stop ids included.
        trained_once: of them, in exactly one window's loss mask.
        trained_more_than_once: must be 0.
        not_trained: of them, by reason.
        untrained_ids: the trajectories concerned, by reason, at most ten each.
        omitted_tokens_per_window: mean over windows of the trajectory's tokens before the window's
            end that the window does not show.
        longest_trajectory_tokens, longest_window_tokens: to compare with max_tokens.
        packing: of the windows that train anything.
    """

    window: WindowConfig
    trajectories: int
    windows: int
    windows_per_trajectory_max: int
    assistant_tokens: int
    trained_once: int
    trained_more_than_once: int
    not_trained: dict[str, int]
    untrained_ids: dict[str, list[str]]
    omitted_tokens_per_window: float
    longest_trajectory_tokens: int
    longest_window_tokens: int
    packing: PackingReport


def split_report(store: TokenStore, config: WindowConfig, row_tokens: int) -> SplitReport:
    """Split every trajectory and recount.

    Raises:
        ValueError: the window settings are impossible, or something is untrainable under the
            policy ``error``.
    """
    rule = window_rule(config, store.header)
    assembler = WindowAssembler(rule, store.header)
    opening = len(store.header.opening_ids)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter({reason.value: 0 for reason in NotTrained})
    ids: dict[str, list[str]] = {reason.value: [] for reason in NotTrained}
    lengths: list[int] = []
    longest = longest_trajectory = most_windows = 0
    for number, trajectory in enumerate(store):
        split = split_trajectory(store, number, rule, config)
        times = _times_trained(trajectory, split, assembler)
        assistant = assistant_tokens(trajectory, opening)
        counts["assistant"] += int(assistant.sum())
        counts["once"] += int((times[assistant] == 1).sum())
        counts["more"] += int((times > 1).sum()) + int((times[~assistant] > 0).sum())
        for turn, reason in split.not_trained:
            start, stop = trajectory.bounds[2 * turn + 1 : 2 * turn + 3]
            reasons[reason.value] += int(stop - start) - opening
            if trajectory.label.id not in ids[reason.value][-1:]:
                ids[reason.value].append(trajectory.label.id)
        counts["windows"] += len(split.windows)
        counts["omitted"] += sum(_omitted(trajectory, window, assembler) for window in split.windows)
        most_windows = max(most_windows, len(split.windows))
        longest_trajectory = max(longest_trajectory, len(trajectory.tokens))
        longest = max([longest, *(window.tokens for window in split.windows)])
        lengths += [window.tokens for window in split.windows if window.trained_turns]
    accounted = counts["once"] + counts["more"] + sum(reasons.values())
    assert accounted >= counts["assistant"], "an assistant token is neither trained nor named"
    return SplitReport(
        window=config,
        trajectories=len(store),
        windows=counts["windows"],
        windows_per_trajectory_max=most_windows,
        assistant_tokens=counts["assistant"],
        trained_once=counts["once"],
        trained_more_than_once=counts["more"],
        not_trained=dict(reasons),
        untrained_ids={reason: names[:10] for reason, names in ids.items() if names},
        omitted_tokens_per_window=counts["omitted"] / max(counts["windows"], 1),
        longest_trajectory_tokens=longest_trajectory,
        longest_window_tokens=longest,
        packing=_packing(np.array(lengths, dtype=np.int64), row_tokens),
    )


def assistant_tokens(trajectory: StoredTrajectory, opening: int) -> np.ndarray:
    """Which tokens an assistant produced, bool, whether trained or not."""
    produced = np.zeros(len(trajectory.tokens), dtype=bool)
    bounds = trajectory.bounds.tolist()
    for start, stop in zip(bounds[1::2], bounds[2::2], strict=False):
        produced[start + opening : stop] = True
    return produced


def _times_trained(trajectory: StoredTrajectory, split: Split, assembler: WindowAssembler) -> np.ndarray:
    """In how many windows' loss masks every token of a trajectory stands."""
    times = np.zeros(len(trajectory.tokens), dtype=np.int64)
    for window in split.windows:
        for span in assembler.spans(window, trajectory.bounds):
            if span.trained:
                times[span.start : span.stop] += trajectory.mask[span.start : span.stop]
    return times


def _omitted(trajectory: StoredTrajectory, window: Window, assembler: WindowAssembler) -> int:
    """Tokens of the trajectory before the window's end that the window does not show."""
    spans = assembler.spans(window, trajectory.bounds)
    shown = sum(span.stop - span.start for span in spans if span.kind is not SpanKind.MARKER)
    return int(trajectory.bounds[2 * window.last_turn + 2]) - shown


def _packing(lengths: np.ndarray, row_tokens: int) -> PackingReport:
    tokens = int(lengths.sum())
    rows, at_least = len(pack_rows(lengths, row_tokens, seed=0)), minimum_rows(lengths, row_tokens)
    return PackingReport(
        row_tokens=row_tokens,
        rows=rows,
        rows_at_least=at_least,
        efficiency=tokens / max(rows * row_tokens, 1),
        efficiency_at_most=tokens / max(at_least * row_tokens, 1),
    )
