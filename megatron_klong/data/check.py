"""A whole store looked through before anything is trained on it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_klong.config import WindowConfig
from megatron_klong.data.blocks import TRAINED, StoredTrajectory
from megatron_klong.data.header import part, window_rule
from megatron_klong.data.store import TokenStore
from megatron_klong.data.windows import split_store, store_turns
from megatron_klong.trajectory.render import Renderer, TokenKind
from megatron_klong.window import REASONS, NotTrained

_LONGEST = 5
_NAMED = 10
_PIECE = 1 << 24


@dataclass(frozen=True)
class KindCount:
    """Tokens of one kind, and how many of them carry loss."""

    tokens: int
    trained: int


@dataclass(frozen=True)
class LongTurn:
    """One of the longest turns."""

    trajectory: str
    turn: int
    action_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Untrained:
    """What the model is never trained on.

    Attributes:
        assistant_tokens: that assistants produced.
        by_reason: of them those without loss, by reason.
        share: of them, all together.
    """

    assistant_tokens: int
    by_reason: dict[str, int]
    share: float


@dataclass(frozen=True)
class StoreCheck:
    """What was found.

    Attributes:
        kinds: tokens by what they are a part of; marker and note of windows are not in a store.
        turns: how many, and quantiles (0.5, 0.9, 0.99, 1) of the tokens of actions and of answers.
        longest: by action and answer together.
        duplicates: groups of trajectories with the same tokens, by id, the first ones.
        duplicate_trajectories: how many could go without a loss of data.
        same_start: trajectories that share their initial messages with another, as rollouts of a task do.
        untrained: under a window setting if one is given; else by what is marked as context.
        problems: why this store should not be trained on; empty where all is well.
    """

    trajectories: int
    tokens: int
    kinds: dict[str, KindCount]
    turns: int
    action_quantiles: tuple[int, ...]
    answer_quantiles: tuple[int, ...]
    longest: tuple[LongTurn, ...]
    duplicates: tuple[tuple[str, ...], ...]
    duplicate_trajectories: int
    same_start: int
    untrained: Untrained
    problems: tuple[str, ...]


def check_store(store: TokenStore, window: WindowConfig | None) -> StoreCheck:
    """Look through all of a store; one pass over its tokens.

    Raises:
        ValueError: the window settings are impossible for it.
    """
    tally = _Tally(store)
    for trajectory in store:
        tally.add(trajectory)
    actions, answers = store.block_lengths[tally.action_blocks], store.block_lengths[tally.action_blocks + 1]
    groups = [ids for ids in tally.by_content.values() if len(ids) > 1]
    starts = [count for count in tally.by_start.values() if count > 1]
    return StoreCheck(
        trajectories=len(store),
        tokens=store.header.tokens,
        kinds=tally.kinds(),
        turns=len(actions),
        action_quantiles=_quantiles(actions),
        answer_quantiles=_quantiles(answers),
        longest=_longest(store, tally.action_blocks, actions, answers),
        duplicates=tuple(tuple(ids[:_NAMED]) for ids in groups[:_NAMED]),
        duplicate_trajectories=sum(len(ids) - 1 for ids in groups),
        same_start=sum(starts),
        untrained=_untrained(store, window),
        problems=tuple(_problems(store, tally)),
    )


class _Tally:
    """What one pass over the tokens gathers."""

    def __init__(self, store: TokenStore) -> None:
        self._opening = len(store.header.opening_ids)
        self._counts = np.zeros(256, dtype=np.int64)
        self.by_content: defaultdict[bytes, list[str]] = defaultdict(list)
        self.by_start: defaultdict[bytes, int] = defaultdict(int)
        self.largest_id = -1
        self.misplaced: list[str] = []
        blocks = np.arange(len(store.block_lengths))
        owner = np.repeat(np.arange(len(store)), np.diff(store.first_blocks))
        within = blocks - store.first_blocks[owner]
        self.action_blocks = blocks[within % 2 == 1]
        self.owner = owner

    def add(self, trajectory: StoredTrajectory) -> None:
        self._counts += np.bincount(trajectory.marks, minlength=256)
        first = int(trajectory.bounds[1])
        content = hashlib.sha256(trajectory.tokens.tobytes())
        content.update(trajectory.bounds.tobytes())
        self.by_content[content.digest()].append(trajectory.label.id)
        self.by_start[hashlib.sha256(trajectory.tokens[:first].tobytes()).digest()] += 1
        if len(trajectory.tokens):
            self.largest_id = max(self.largest_id, int(trajectory.tokens.max()))
        allowed = np.zeros(len(trajectory.tokens), dtype=bool)
        for start, stop in zip(trajectory.bounds[1::2].tolist(), trajectory.bounds[2::2].tolist()):
            allowed[start + self._opening : stop] = True
        if (trajectory.trained(0, len(trajectory.tokens)) & ~allowed).any():
            self.misplaced.append(trajectory.label.id)

    def kinds(self) -> dict[str, KindCount]:
        return {
            kind.name.lower(): KindCount(
                int(self._counts[kind] + self._counts[kind | TRAINED]), int(self._counts[kind | TRAINED])
            )
            for kind in TokenKind
        }


def _problems(store: TokenStore, tally: _Tally) -> Iterator[str]:
    try:
        store.renderer()
    except ValueError as error:
        yield str(error)
    if content_hash(store) != store.header.content_sha256:
        yield "a part of the store has changed since it was written (another hash); tokenize again"
    if tally.largest_id >= store.header.vocab_size:
        yield f"token id {tally.largest_id} is not below the tokenizer's {store.header.vocab_size}"
    if tally.misplaced:
        yield f"loss on what no assistant produced, in {', '.join(tally.misplaced[:_NAMED])}"
    trained = sum(count.trained for count in tally.kinds().values())
    if trained != store.header.trained_tokens:
        yield f"{trained} tokens carry loss, the header says {store.header.trained_tokens}"
    if not trained:
        yield "no token carries loss"


def content_hash(store: TokenStore) -> str:
    """The hash of what a store holds now, as it was made when it was written."""
    content = hashlib.sha256()

    def of_file(suffix: str) -> bytes:
        seen = hashlib.sha256()
        with part(store.prefix, suffix).open("rb") as stream:
            while piece := stream.read(_PIECE):
                seen.update(piece)
        return seen.digest()

    content.update(of_file("bin"))
    counts = np.diff(store.first_blocks)
    content.update(np.insert(store.block_lengths, store.first_blocks[:-1], counts).astype(np.int32).tobytes())
    for suffix in ("marks", "trajectories.jsonl"):
        content.update(of_file(suffix))
    content.update(store.turn_marks.tobytes())
    header = store.header
    inserted = (header.opening_ids, header.marker_ids, header.note_ids)
    content.update(json.dumps([inserted, header.tool_sets]).encode())
    return content.hexdigest()


def _untrained(store: TokenStore, window: WindowConfig | None) -> Untrained:
    if window is not None:
        split = split_store(store, window_rule(window, store.header), window)
        turns = split.turns
        reasons = {
            reason.value: int(turns.action_tokens[split.table.reasons == REASONS.index(reason)].sum())
            for reason in NotTrained
        }
    else:
        turns = store_turns(store, WindowConfig(
            max_tokens=1, overlap_tokens=0, reserve_generation=1, reserve_observation=1
        ))  # fmt: skip
        reasons = {NotTrained.CONTEXT_ONLY.value: int(turns.action_tokens[turns.context_only].sum())}
    total = int(turns.action_tokens.sum())
    return Untrained(total, reasons, sum(reasons.values()) / max(total, 1))


def _quantiles(lengths: np.ndarray) -> tuple[int, ...]:
    if not len(lengths):
        return ()
    return tuple(int(q) for q in np.quantile(lengths, (0.5, 0.9, 0.99, 1.0), method="higher"))


def _longest(
    store: TokenStore, blocks: np.ndarray, actions: np.ndarray, answers: np.ndarray
) -> tuple[LongTurn, ...]:
    order = np.argsort(-(actions.astype(np.int64) + answers), kind="stable")[:_LONGEST]
    owners = np.searchsorted(store.first_blocks, blocks[order], side="right") - 1
    return tuple(
        LongTurn(
            store.labels[number].id, int((blocks[place] - store.first_blocks[number] - 1) // 2),
            int(actions[place]), int(answers[place]),
        )
        for place, number in zip(order.tolist(), owners.tolist())
    )  # fmt: skip


def shown_text(trajectory: StoredTrajectory, renderer: Renderer, characters: int) -> str:
    """A trajectory as text, what carries loss between ⟦ and ⟧; the middle left out where it is long."""
    edges = np.flatnonzero(
        np.diff(trajectory.trained(0, len(trajectory.tokens)), prepend=False, append=False)
    )
    pieces: list[str] = []
    place = 0
    for number, edge in enumerate([*edges.tolist(), len(trajectory.tokens)]):
        text = renderer.decode(trajectory.tokens[place:edge].tolist())
        if len(text) > characters:
            half, left_out = characters // 2, len(text) - characters
            text = f"{text[:half]} [... {left_out} characters] {text[-half:]}"
        pieces.append(f"⟦{text}⟧" if number % 2 else text)
        place = edge
    return "".join(pieces)
