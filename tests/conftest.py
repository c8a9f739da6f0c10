from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
from megatron_klong.factory.generate import generate_domain
from megatron_klong.platform import import_megatron
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.importing import import_trajectories, read_imported
from megatron_klong.trajectory.tokenizer import save_tokenizer, train_bpe_tokenizer, trajectory_texts
from tests.ranks import RankPool
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster

import_megatron()

# Started by nohup, or in the background of a script, these are ignored, and what we start would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """The gloo ranks of all distributed tests."""
    return RankPool()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A Slurm of four nodes, and what this machine makes of the scripts' settings."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("slurm")
    with slurm_cluster(root) as found:
        found.environment |= {
            "KLONG_HOME": str(ROOT), "KLONG_VENV": sys.prefix, "KLONG_LOGS": str(root / "logs"),
            # Nodes' names are not in any DNS here.
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "KLONG_SERVER_HOST": "127.0.0.1",
            "KLONG_SERVER_ADDRESS": "127.0.0.1",
        }  # fmt: skip
        yield found


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
    generate_domain(folder, count=12, seed=7, renderer="glm-4.5", inserted_texts=(MARKER_TEXT, NOTE_TEXT))
    return folder


@pytest.fixture(scope="session")
def domain_store(domain: Path) -> Path:
    """The domain as a token store; the prefix of its files."""
    from megatron_klong.data.tokenize import tokenize

    prefix = domain / "store" / "replication"
    tokenize(domain / "trajectories.jsonl", prefix, renderer="glm-4.5", tokenizer=domain / "tokenizer")
    return prefix


@pytest.fixture(scope="session")
def chats(domain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store of ten short chats, of the domain's tokenizer; the prefix of its files."""
    from megatron_klong.data.tokenize import tokenize
    from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
    from megatron_klong.trajectory.schema import Message, Trajectory

    folder = tmp_path_factory.mktemp("chats")
    lines = [
        write_openai_chat(Trajectory(f"chat-{n}", (Message("user", f"{n}"), Message("assistant", f"{n}{n}"))))
        for n in range(10)
    ]
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
    tokenize(folder / "t.jsonl", folder / "store", renderer="glm-4.5", tokenizer=domain / "tokenizer")
    return folder / "store"


@pytest.fixture(scope="session")
def real_store(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Long runs of one user message, and chats of several, tokenized: (imported file, store prefix)."""
    from megatron_klong.data.tokenize import tokenize

    folder = tmp_path_factory.mktemp("real")
    kinds = ("mini-swe-agent/*.json", "tau-bench/*.json")
    files = [file for kind in kinds for file in sorted((shared_data / "trajectories").glob(kind))]
    report = import_trajectories(files, folder / "all.jsonl")
    assert (report.read, report.refused) == (202, 0)
    chat_format = FORMATS["glm-4.5"]
    texts = (
        text for item in read_imported(folder / "all.jsonl") for text in trajectory_texts(item, chat_format)
    )
    save_tokenizer(train_bpe_tokenizer(texts, chat_format, 2048), folder / "tokenizer")
    tokenize(folder / "all.jsonl", folder / "store", renderer="glm-4.5", tokenizer=folder / "tokenizer")
    return folder / "all.jsonl", folder / "store"
