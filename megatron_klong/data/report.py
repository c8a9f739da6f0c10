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
from megatron_klong.data.windows import StoreWindows, WindowAssembler, split_store
from megatron_klong.window import REASONS, NotTrained, Window

_SHOWN_IDS = 10


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
    split = split_store(store, rule, config)
    table = split.table
    counts: Counter[str] = Counter()
    for number, trajectory in enumerate(store):
        windows = [table.window(place) for place in table.of(number)]
        times = _times_trained(trajectory, windows, assembler)
        assistant = assistant_tokens(trajectory, opening)
        counts["assistant"] += int(assistant.sum())
        counts["once"] += int((times[assistant] == 1).sum())
        counts["more"] += int((times > 1).sum()) + int((times[~assistant] > 0).sum())
        counts["omitted"] += sum(_omitted(trajectory, window, assembler) for window in windows)
    reasons, ids = _not_trained(store, split)
    accounted = counts["once"] + counts["more"] + sum(reasons.values())
    assert accounted >= counts["assistant"], "an assistant token is neither trained nor named"
    return SplitReport(
        window=config,
        trajectories=len(store),
        windows=len(table),
        windows_per_trajectory_max=int(table.number.max(initial=-1)) + 1,
        assistant_tokens=counts["assistant"],
        trained_once=counts["once"],
        trained_more_than_once=counts["more"],
        not_trained=reasons,
        untrained_ids={reason: names for reason, names in ids.items() if names},
        omitted_tokens_per_window=counts["omitted"] / max(len(table), 1),
        longest_trajectory_tokens=max(int(store.lengths(number).sum()) for number in range(len(store))),
        longest_window_tokens=int(table.tokens.max(initial=0)),
        packing=_packing(table.tokens[table.trains], row_tokens),
    )


def assistant_tokens(trajectory: StoredTrajectory, opening: int) -> np.ndarray:
    """Which tokens an assistant produced, bool, whether trained or not."""
    produced = np.zeros(len(trajectory.tokens), dtype=bool)
    bounds = trajectory.bounds.tolist()
    for start, stop in zip(bounds[1::2], bounds[2::2], strict=False):
        produced[start + opening : stop] = True
    return produced


def _not_trained(store: TokenStore, split: StoreWindows) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Assistant tokens by the reason why they carry no loss, and the trajectories concerned."""
    tokens = {reason.value: 0 for reason in NotTrained}
    ids: dict[str, list[str]] = {reason.value: [] for reason in NotTrained}
    owner = np.repeat(np.arange(len(store)), np.diff(split.turns.first_turn))
    for reason in NotTrained:
        concerned = split.table.reasons == REASONS.index(reason)
        tokens[reason.value] = int(split.turns.action_tokens[concerned].sum())
        for number in np.unique(owner[concerned])[:_SHOWN_IDS].tolist():
            ids[reason.value].append(store.labels[number].id)
    return tokens, ids


def _times_trained(
    trajectory: StoredTrajectory, windows: list[Window], assembler: WindowAssembler
) -> np.ndarray:
    """In how many windows' loss masks every token of a trajectory stands."""
    times = np.zeros(len(trajectory.tokens), dtype=np.int64)
    for window in windows:
        for stretch in assembler.stretches(window, trajectory.bounds):
            if stretch.trained:
                times[stretch.start : stretch.stop] += trajectory.trained(stretch.start, stretch.stop)
    return times


def _omitted(trajectory: StoredTrajectory, window: Window, assembler: WindowAssembler) -> int:
    """Tokens of the trajectory before the window's end that the window does not show."""
    shown = sum(stretch.stop - stretch.start for stretch in assembler.stretches(window, trajectory.bounds))
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
