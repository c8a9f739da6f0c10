"""Token store, windows over it, and the account of every assistant token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_klong.config import DataConfig, SourceConfig, WindowConfig
from megatron_klong.data.dataset import build_datasets
from megatron_klong.data.header import part, window_rule
from megatron_klong.data.report import split_report
from megatron_klong.data.show import show_trajectory
from megatron_klong.data.store import TokenStore
from megatron_klong.data.tokenize import tokenize
from megatron_klong.data.windows import WindowAssembler, split_store
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.importing import read_imported
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.render import Renderer, load_renderer
from megatron_klong.trajectory.schema import Message, Trajectory
from megatron_klong.trajectory.tokenizer import phrase_tokenizer, save_tokenizer

DOMAIN_WINDOW = WindowConfig(
    max_tokens=256, overlap_tokens=48, reserve_generation=16, reserve_observation=16,
    prefix="reading", max_prefix_fraction=0.4,
)  # fmt: skip


def cut(ids: list[int], cap: int, note: list[int]) -> list[int]:
    if len(ids) <= cap:
        return ids
    tail = (cap - len(note)) // 2
    return ids[: cap - len(note) - tail] + note + ids[len(ids) - tail :]


def live_samples(
    renderer: Renderer, trajectory: Trajectory, config: WindowConfig, store: TokenStore
) -> list[list[int]]:
    """The token sequences of a rollout that replays a trajectory: each window's last context with
    its action. Written from the design on plain lists (prefix rule `task`)."""
    header, rendered = store.header, renderer.render(trajectory)
    opening, note = list(header.opening_ids), list(header.note_ids)
    room = len(opening) + config.reserve_generation
    actions = [
        opening + cut(list(turn.action_ids[len(opening) :]), config.reserve_generation, note)
        for turn in rendered.turns
    ]
    turns = [
        action + cut(list(turn.answer_ids), config.reserve_observation, note)
        for action, turn in zip(actions, rendered.turns, strict=True)
    ]
    base, shown, samples = list(rendered.initial_ids), list[int](), list[list[int]]()
    for number in range(len(turns)):
        seen = base + [token for turn in shown for token in turns[turn]]
        slides = len(seen) + room > config.max_tokens
        if slides:
            base = [*rendered.initial_ids, *header.marker_ids]
            shown, kept = [number - 1], len(turns[number - 1])
            limit = max(config.overlap_tokens, kept)
            while kept + len(turns[shown[0] - 1]) <= limit:
                shown.insert(0, shown[0] - 1)
                kept += len(turns[shown[0]])
            seen = base + [token for turn in shown for token in turns[turn]]
        if samples and not slides:
            samples.pop()
        samples.append(seen + actions[number])
        shown.append(number)
    return samples


REAL_WINDOW = WindowConfig(
    max_tokens=16384, overlap_tokens=2048, reserve_generation=1024, reserve_observation=2048
)


def test_real_trajectories_account_for_every_assistant_token(real_store: tuple[Path, Path]) -> None:
    file, prefix = real_store
    store = TokenStore(prefix)
    report = split_report(store, REAL_WINDOW, REAL_WINDOW.max_tokens)
    renderer = load_renderer("glm-4.5", prefix.parent / "tokenizer")
    opening = len(renderer.opening_ids)
    produced = sum(
        len(turn.action_ids) - opening
        for trajectory in read_imported(file)
        for turn in renderer.render(trajectory).turns
    )
    assert report.assistant_tokens == produced == store.header.trained_tokens
    assert report.trained_once + sum(report.not_trained.values()) == produced
    assert report.trained_more_than_once == 0
    assert report.not_trained["action_over_limit"] > 0  # these runs write long files
    assert report.windows > report.trajectories == 202
    assert report.longest_trajectory_tokens > 4 * REAL_WINDOW.max_tokens
    assert report.longest_window_tokens <= REAL_WINDOW.max_tokens
    assert report.packing.rows >= report.packing.rows_at_least


def test_real_windows_are_the_contexts_of_a_live_run(real_store: tuple[Path, Path]) -> None:
    file, prefix = real_store
    store = TokenStore(prefix)
    renderer = load_renderer("glm-4.5", prefix.parent / "tokenizer")
    rule = window_rule(REAL_WINDOW, store.header)
    assembler = WindowAssembler(rule, store.header)
    table = split_store(store, rule, REAL_WINDOW).table
    several = 0
    for number, trajectory in enumerate(read_imported(file)):
        stored = store.trajectory(number)
        windows = [table.window(place) for place in table.of(number)]
        samples = [assembler.sample(window, stored, number).tokens_T.tolist() for window in windows]
        assert samples == live_samples(renderer, trajectory, REAL_WINDOW, store)
        several += len(windows) > 1
    assert several >= 2


def test_qwen_renders_and_accounts_for_real_trajectories(
    real_store: tuple[Path, Path], tmp_path: Path
) -> None:
    file, _ = real_store
    save_tokenizer(phrase_tokenizer([], FORMATS["qwen3"]), tmp_path / "tokenizer")
    tokenize(file, tmp_path / "store", renderer="qwen3", tokenizer=tmp_path / "tokenizer")
    window = WindowConfig(
        max_tokens=65536, overlap_tokens=4096, reserve_generation=8192, reserve_observation=8192
    )
    report = split_report(TokenStore(tmp_path / "store"), window, window.max_tokens)
    assert report.trained_more_than_once == 0
    assert report.trained_once + sum(report.not_trained.values()) == report.assistant_tokens > 0


def test_show_lets_anyone_recount(domain_store: Path) -> None:
    store = TokenStore(domain_store)
    report = split_report(store, DOMAIN_WINDOW, 1024)
    assert report.windows > 3 * report.trajectories
    assert report.longest_trajectory_tokens > 3 * DOMAIN_WINDOW.max_tokens
    trained = windows = 0
    for number, label in enumerate(store.labels):
        view = show_trajectory(store, label.id, DOMAIN_WINDOW)
        stored = store.trajectory(number)
        times: Counter[int] = Counter()
        for window in view.windows:
            assert window.tokens == len(window.token_ids) == len(window.loss_mask) <= 256
            place = 0
            for span in window.spans:
                mask = window.loss_mask[place : place + span.length]
                assert sum(mask) == span.trained
                if span.start is not None and span.stop is not None:
                    shown = window.token_ids[place : place + span.length]
                    assert shown == tuple(stored.tokens[span.start : span.stop].tolist())
                    times.update(span.start + index for index, carries in enumerate(mask) if carries)
                else:
                    assert not any(mask)
                place += span.length
            assert place == window.tokens
        assert set(times.values()) == {1}
        assert len(times) == view.assistant_tokens
        trained += len(times)
        windows += len(view.windows)
    assert (trained, windows) == (report.trained_once, report.windows)


def test_later_windows_hold_prefix_marker_and_last_turn(domain_store: Path) -> None:
    store = TokenStore(domain_store)
    view = show_trajectory(store, store.labels[0].id, DOMAIN_WINDOW)
    for before, window in zip(view.windows, view.windows[1:], strict=False):
        kinds = [span.kind for span in window.spans]
        assert kinds[:4] == ["prefix", "prefix", "prefix", "marker"]  # task, reading action and answer
        overlap = [span.turn for span in window.spans if span.kind == "overlap"]
        assert overlap[-1] == before.spans[-1].turn
        assert all(span.trained == 0 for span in window.spans if span.kind != "action")


def small_store(tmp_path: Path, *trajectories: Trajectory) -> TokenStore:
    chat_format = FORMATS["glm-4.5"]
    folder = tmp_path.with_name(f"{tmp_path.name}-inputs")
    save_tokenizer(phrase_tokenizer(["\n[...]\n"], chat_format), folder)
    (folder / "t.jsonl").write_text("".join(write_openai_chat(each) + "\n" for each in trajectories))
    tokenize(folder / "t.jsonl", tmp_path / "small", renderer="glm-4.5", tokenizer=folder)
    return TokenStore(tmp_path / "small")


def test_reasons_policies_and_truncation(tmp_path: Path) -> None:
    messages = (
        Message("user", "u"),
        Message("assistant", "copied", context_only=True),
        Message("user", "x" * 200),
        Message("assistant", "y" * 200),
        Message("user", "on"),
        Message("assistant", "fine"),
    )
    store = small_store(
        tmp_path,
        Trajectory("mixed", messages),
        Trajectory("huge", (Message("user", "z" * 400), Message("assistant", "a"))),
    )
    window = WindowConfig(max_tokens=512, overlap_tokens=0, reserve_generation=60, reserve_observation=60)
    report = split_report(store, window, 512)
    opening = 1
    sizes = [store.lengths(0)[block] - opening for block in (1, 3, 5)]
    assert report.not_trained == {
        "context_only": sizes[0],
        "action_over_limit": sizes[1],
        "prefix_over_cap": store.lengths(1)[1] - opening,
    }
    assert report.trained_once == sizes[2]
    assert report.untrained_ids == {
        "context_only": ["mixed"], "action_over_limit": ["mixed"], "prefix_over_cap": ["huge"],
    }  # fmt: skip
    spans = show_trajectory(store, "mixed", window).windows[0].spans
    noted = [(span.turn, span.length) for span in spans if span.kind == "note"]
    assert noted == [(0, 1), (1, 1)]
    # The long answer: head, note and tail are exactly B; the long action: opening and exactly G.
    assert sum(span.length for span in spans if span.turn == 1) == opening + 60 + store.lengths(0)[4]
    with pytest.raises(ValueError, match=r"trajectory 'mixed': .*turn 1 has 2\d\d tokens"):
        split_report(store, window.model_copy(update={"untrainable": "error"}), 512)


def test_marked_prefix(tmp_path: Path) -> None:
    turns = [message for _ in range(20) for message in (Message("assistant", "act"), Message("user", "obs"))]
    store = small_store(
        tmp_path,
        Trajectory("m", (Message("user", "u"), *turns), prefix_messages=5),
        Trajectory("n", (Message("user", "u"), *turns)),
    )
    window = WindowConfig(
        max_tokens=240, overlap_tokens=0, reserve_generation=40, reserve_observation=20, prefix="marked",
        max_prefix_fraction=0.4,
    )  # fmt: skip
    later = show_trajectory(store, "m", window).windows[1]
    assert {span.turn for span in later.spans if span.kind == "prefix"} == {None, 0, 1}
    with pytest.raises(ValueError, match=r"trajectory 'n': window\.prefix=marked needs prefix_messages"):
        show_trajectory(store, "n", window)
    with pytest.raises(ValueError, match=r"prefix_messages: 2 must end the initial messages or a whole turn"):
        small_store(tmp_path, Trajectory("m", (Message("user", "u"), *turns), prefix_messages=2))


def test_a_failed_write_leaves_the_old_store(domain_store: Path, tmp_path: Path) -> None:
    store = small_store(tmp_path, Trajectory("a", (Message("user", "u"), Message("assistant", "b"))))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: messages: .*klong data import"):
        tokenize(
            tmp_path / "bad.jsonl", tmp_path / "small", renderer="glm-4.5",
            tokenizer=domain_store.parents[1] / "tokenizer",
        )  # fmt: skip
    (tmp_path / "bad.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(store) == 1


@pytest.mark.parametrize("suffix", ["bin", "marks"])
def test_a_truncated_store_is_refused(tmp_path: Path, suffix: str) -> None:
    small_store(tmp_path, Trajectory("a", (Message("user", "u"), Message("assistant", "b"))))
    file = part(tmp_path / "small", suffix)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"header says \d+ tokens.*truncated"):
        TokenStore(tmp_path / "small")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("idx", b""), ("idx", b"junk"), ("json", b"[]"), ("json", b'{"version": 2}'), ("json", b"\xff"),
        ("trajectories.jsonl", b""), ("trajectories.jsonl", b'{"id":'),
        (
            "trajectories.jsonl",
            b'{"id": "a", "task_id": null, "reward": null, "marked_turns": null, "turns": []}',
        ),
    ],
)  # fmt: skip
def test_a_damaged_store_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    small_store(tmp_path, Trajectory("a", (Message("user", "u"), Message("assistant", "b"))))
    part(tmp_path / "small", suffix).write_bytes(content)
    with pytest.raises(ValueError, match=r"store .*small: .*(damaged|no header|no readable|does not fit)"):
        TokenStore(tmp_path / "small").labels  # noqa: B018 (read on first use)


def test_the_hash_tells_blocks_apart(tmp_path: Path) -> None:
    def content_hash(*messages: Message) -> str:
        return small_store(tmp_path, Trajectory("a", messages)).header.content_sha256

    user = Message("user", "u")
    cut, whole = Message("assistant", "b", cut=True), Message("assistant", "b")
    # The same tokens: once the stop id ends the action, once it opens the answer block.
    assert content_hash(user, cut, user) != content_hash(user, whole, user)
    assert content_hash(user, cut, user) == content_hash(user, cut, user)


def test_a_failed_rename_leaves_the_old_store(tmp_path: Path) -> None:
    first = Trajectory("a", (Message("user", "u"), Message("assistant", "b")))
    small_store(tmp_path, first)
    part(tmp_path / "small", "marks").rename(tmp_path / "marks")
    part(tmp_path / "small", "marks").mkdir()
    with pytest.raises(ValueError, match=r"small\.marks is a directory"):
        small_store(tmp_path, first)
    part(tmp_path / "small", "marks").rmdir()
    (tmp_path / "marks").rename(part(tmp_path / "small", "marks"))
    assert len(TokenStore(tmp_path / "small")) == 1
    # What was rendered is kept for another try.
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".small.building"]


def test_missing_parts_and_other_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no readable header small\.json"):
        TokenStore(tmp_path / "small")
    small_store(tmp_path, Trajectory("a", (Message("user", "u"), Message("assistant", "b"))))
    part(tmp_path / "small", "idx").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"small\.idx is missing"):
        TokenStore(tmp_path / "small")
    header = json.loads(part(tmp_path / "small", "json").read_text())
    part(tmp_path / "small", "json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        TokenStore(tmp_path / "small")


def domain_config(store: Path, held_out: float) -> DataConfig:
    return DataConfig(
        sources={"domain": SourceConfig(store=store)}, window=DOMAIN_WINDOW, validation_fraction=held_out
    )  # fmt: skip


def test_train_and_validation_share_no_trajectory(domain_store: Path) -> None:
    windows = build_datasets(domain_config(domain_store, 0.25), seed=1)["domain"]
    train, validation = windows.train, windows.validation
    assert validation is not None

    def trajectories(dataset: object) -> set[int]:
        return {dataset.sample(index).trajectory for index in range(len(dataset))}  # type: ignore[attr-defined,arg-type]

    assert trajectories(train) == set(range(9))
    assert trajectories(validation) == set(range(9, 12))
    assert np.array_equal(train[0]["tokens_T"], train[len(train)]["tokens_T"])  # items wrap
    assert train.unique_description_hash != validation.unique_description_hash


def test_what_changes_the_windows_changes_the_identity(domain_store: Path) -> None:
    def identity(**change: object) -> str:
        window = DOMAIN_WINDOW.model_copy(update=change)
        config = domain_config(domain_store, 0.05).model_copy(update={"window": window})
        return build_datasets(config, 1)["domain"].train.unique_description_hash

    base = identity()
    assert base == identity()
    for change in (
        {"max_tokens": 255}, {"overlap_tokens": 47}, {"reserve_generation": 15},
        {"reserve_observation": 15}, {"prefix": "task"},
    ):  # fmt: skip
        assert identity(**change) != base


def test_a_split_without_room_is_refused(domain_store: Path) -> None:
    for fraction in (0.01, 0.99):
        with pytest.raises(ValueError, match=r"validation_fraction=.* of the 12 trajectories"):
            build_datasets(domain_config(domain_store, fraction), 1)
    windows = build_datasets(domain_config(domain_store, 0), 1)["domain"]
    train = windows.train
    assert windows.validation is None
    assert {train.sample(index).trajectory for index in range(len(train))} == set(range(12))
