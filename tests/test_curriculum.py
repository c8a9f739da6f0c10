"""Phases of mixed sources: how often every window comes, and that a step's data follow from its number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klong.config import DataConfig, WindowConfig, validate_config
from megatron_klong.data.curriculum import Curriculum
from megatron_klong.data.dataset import build_datasets
from megatron_klong.data.rows import SampleName
from megatron_klong.data.tokenize import tokenize
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.schema import Message, Trajectory
from megatron_klong.trajectory.tokenizer import phrase_tokenizer, save_tokenizer

WINDOW = WindowConfig(
    max_tokens=256, overlap_tokens=48, reserve_generation=40, reserve_observation=40, prefix="reading",
    max_prefix_fraction=0.3,
)  # fmt: skip
BATCH = 4


@pytest.fixture(scope="module")
def stores(domain_store: Path, chats: Path) -> dict[str, Any]:
    return {"domain": {"store": domain_store}, "chats": {"store": chats}}


def curriculum(
    stores: dict[str, Any], phases: dict[str, Any], held_out: float = 0.25, seed: int = 3
) -> Curriculum:
    values = {
        "sources": stores,
        "phases": phases,
        "window": WINDOW.model_dump(),
        "validation_fraction": held_out,
    }
    config = validate_config(DataConfig, values, "test")
    return Curriculum(config, build_datasets(config, seed), BATCH, seed)


def counted(plan: Curriculum, phase: int = 0) -> dict[str, Counter[SampleName]]:
    """How often each window comes in a phase, by source."""
    found: dict[str, Counter[SampleName]] = {}
    part = plan.phases[phase]
    for step in range(part.first_step, part.last_step + 1):
        for name in plan.samples(step):
            found.setdefault(str(name[0]).split("/")[0], Counter())[name] += 1
    return found


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_by_default_every_window_comes_once(stores: dict[str, Any], held_out: float) -> None:
    plan = curriculum(stores, {"train": {}}, held_out)
    found = counted(plan)
    assert set(found["domain"].values()) == set(found["chats"].values()) == {1}
    trajectories = {name[0] for name in found["chats"]}
    assert len(trajectories) == (10 if held_out == 0 else 8)
    assert plan.steps == plan.phases[0].last_step == -(-plan.phases[0].rows.total // BATCH)


@pytest.mark.parametrize(("of_domain", "of_chats"), [(1, 3), (2.5, 1), (0.5, 0.25), (3, 3)])
def test_every_window_comes_as_often_as_its_epochs_say(
    stores: dict[str, Any], of_domain: float, of_chats: float
) -> None:
    mixes = {"domain": {"epochs": of_domain}, "chats": {"epochs": of_chats}}
    plan = curriculum(stores, {"train": {"sources": mixes}}, held_out=0)
    found = counted(plan)
    sizes = {name: len(build_datasets(_config(stores), 3)[name].train.lengths) for name in stores}
    for name, epochs in (("domain", of_domain), ("chats", of_chats)):
        assert sum(found[name].values()) == round(epochs * sizes[name])
        assert max(found[name].values()) - min(found[name].values()) <= 1
        assert len(found[name]) == min(sizes[name], round(epochs * sizes[name]))


def _config(stores: dict[str, Any]) -> DataConfig:
    values = {"sources": stores, "window": WINDOW.model_dump(), "validation_fraction": 0}
    return validate_config(DataConfig, values, "test")


@pytest.mark.parametrize("weight", [0.1, 1.0, 4.0])
def test_weights_are_ratios_of_windows_and_small_sources_come_again(
    stores: dict[str, Any], weight: float
) -> None:
    mixes = {"domain": {}, "chats": {"weight": weight}}
    found = counted(curriculum(stores, {"train": {"steps": 40, "sources": mixes}}, held_out=0))
    chats, domain = sum(found["chats"].values()), sum(found["domain"].values())
    assert chats / domain == pytest.approx(weight, rel=0.15)  # 160 rows end in the middle of a pass
    sizes = {"domain": len(found["domain"]), "chats": 10}
    each_pass = max(sizes["domain"], 10 / weight)  # windows of a source with weight 1 in a pass
    for name, share in (("domain", each_pass), ("chats", weight * each_pass)):
        # The last pass is not complete; all others have each window equally often but for one time.
        times = [found[name].get(window, 0) for window in found[name]]
        assert max(times) - min(times) <= share / sizes[name] + 2


def test_phases_follow_one_another_each_with_its_own_sources(stores: dict[str, Any]) -> None:
    phases = {
        "general": {"steps": 3, "sources": {"chats": {}}},
        "agent": {"sources": {"domain": {"epochs": 2}}},
        "again": {"steps": 2},
    }
    plan = curriculum(stores, phases)
    assert [phase.name for phase in plan.phases] == ["general", "agent", "again"]
    assert [phase.first_step for phase in plan.phases] == [1, 4, plan.steps - 1]
    assert set(counted(plan, 0)) == {"chats"}
    assert set(counted(plan, 1)) == {"domain"} and set(counted(plan, 1)["domain"].values()) == {2}
    assert set(counted(plan, 2)) == {"chats", "domain"}
    assert [plan.phase(step).name for step in (3, 4, plan.steps)] == ["general", "agent", "again"]


def test_the_last_step_of_a_phase_is_filled_with_empty_rows(stores: dict[str, Any]) -> None:
    plan = curriculum(stores, {"train": {}})
    rows = plan.phases[0].rows
    assert rows.total % BATCH  # or this test shows nothing
    last = plan.batch(plan.steps, 0, 1)
    assert len(last) == BATCH
    assert sum(not row.samples for row in last) == -rows.total % BATCH


@pytest.mark.parametrize("ways", [2, 4])
def test_a_batch_is_the_same_at_any_data_parallel_size(stores: dict[str, Any], ways: int) -> None:
    plan, other = curriculum(stores, {"train": {"steps": 9}}), curriculum(stores, {"train": {"steps": 9}})
    for step in (9, 1, 5):
        whole = sorted(row.tokens_R.tobytes() for row in plan.batch(step, 0, 1))
        parts = sorted(
            row.tokens_R.tobytes() for rank in range(ways) for row in other.batch(step, rank, ways)
        )
        assert whole == parts
        assert plan.fingerprint(step) == other.fingerprint(step) != plan.fingerprint(step % 9 + 1)
        named = [name for row in plan.batch(step, 0, 1) for name in row.samples]
        assert sorted(named) == sorted(plan.samples(step))


def test_passes_and_seeds_are_packed_differently(stores: dict[str, Any]) -> None:
    twice = {"train": {"sources": {"domain": {"epochs": 2}}}}
    plan, other = curriculum(stores, twice), curriculum(stores, twice, seed=4)
    names = [plan.samples(step) for step in range(1, plan.steps + 1)]
    assert len({tuple(each) for each in names}) == plan.steps
    assert names != [other.samples(step) for step in range(1, plan.steps + 1)]


def test_a_source_may_hold_out_its_own_share(stores: dict[str, Any]) -> None:
    own = {**stores, "chats": {**stores["chats"], "validation_fraction": 0.5}}
    values = {"sources": own, "window": WINDOW.model_dump(), "validation_fraction": 0}
    windows = build_datasets(validate_config(DataConfig, values, "test"), 1)
    assert windows["domain"].validation is None
    held_out = windows["chats"].validation
    assert held_out is not None
    assert {held_out.name(n)[0] for n in range(len(held_out.lengths))} == {
        f"chats/chat-{n}" for n in range(5, 10)
    }


def test_names_are_those_of_the_samples(stores: dict[str, Any]) -> None:
    domain = build_datasets(_config(stores), 1)["domain"].train
    for index in range(len(domain.lengths)):
        assert domain.packable(index).name == domain.name(index)
    assert domain.name(0)[1] == 0 and str(domain.name(0)[0]).startswith("domain/")
    assert len({domain.name(n) for n in range(len(domain.lengths))}) == len(domain.lengths)
    assert np.array_equal(domain[0]["tokens_T"], domain[len(domain)]["tokens_T"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": {}}, "data.phases: name at least one phase"),
        ({"sources": {}}, "sources"),
        ({"phases": {"a": {"sources": {"chat": {}}}}}, "data.phases.a.sources.chat: no such source"),
        ({"phases": {"a": {"sources": {"chats": {"weight": 2}}}}}, "weight=2.0 in a phase without steps"),
        (
            {"phases": {"a": {"steps": 3, "sources": {"chats": {"epochs": 2}}}}},
            "epochs=2.0 in a phase with steps",
        ),
        ({"phases": {"a": {"step": 3}}}, "unknown key 'phases.a.step'; did you mean 'phases.a.steps'?"),
        ({"phases": {"a": {"sources": {"chats": {"epochs": 0}}}}}, "epochs"),
        ({"validation_fraction": 0.99}, r"data.validation_fraction=0.99 of the 12 trajectories of domain"),
    ],
)
def test_impossible_mixes_are_refused(stores: dict[str, Any], values: dict[str, Any], message: str) -> None:
    base = {"sources": stores, "window": WINDOW.model_dump()}
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_datasets(validate_config(DataConfig, {**base, **values}, "test"), 1)


def test_sources_of_different_tokenizers_are_not_mixed(stores: dict[str, Any], tmp_path: Path) -> None:
    chat = Trajectory("other", (Message("user", "hello"), Message("assistant", "there")))
    (tmp_path / "t.jsonl").write_text(write_openai_chat(chat) + "\n")
    save_tokenizer(phrase_tokenizer(["hello", "there"], FORMATS["glm-4.5"]), tmp_path / "tokenizer")
    tokenize(tmp_path / "t.jsonl", tmp_path / "store", renderer="glm-4.5", tokenizer=tmp_path / "tokenizer")
    values = {"sources": {**stores, "other": {"store": tmp_path / "store"}}, "window": WINDOW.model_dump(),
              "validation_fraction": 0}  # fmt: skip
    with pytest.raises(
        ValueError, match=r"data\.sources\.other\.store=.* another tokenizer or chat format than domain"
    ):
        build_datasets(validate_config(DataConfig, values, "test"), 1)
