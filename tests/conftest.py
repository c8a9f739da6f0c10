from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
from megatron_klong.factory.generate import generate_domain
from megatron_klong.platform import quiet_imports
from tests.ranks import RankPool

quiet_imports()

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The pool of gloo ranks that all distributed tests share."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real trajectories and published chat templates, which the project may not redistribute."""
    if not SHARED.is_dir():
        pytest.skip("the folder with real trajectories is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated domain: 12 tasks, trajectories, tokenizer."""
    folder = tmp_path_factory.mktemp("domain")
    generate_domain(
        folder, count=12, seed=7, renderer="glm-4.5", inserted_texts=(MARKER_TEXT, NOTE_TEXT)
    )
    return folder


@pytest.fixture(scope="session")
def domain_store(domain: Path) -> Path:
    """The domain as a token store; the prefix of its files."""
    from megatron_klong.data.tokenize import tokenize

    prefix = domain / "store" / "replication"
    tokenize(
        domain / "trajectories.jsonl", prefix, renderer="glm-4.5", tokenizer=domain / "tokenizer"
    )
    return prefix
