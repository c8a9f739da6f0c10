"""What orchestrator, trainer and servers tell one another, as files in the run directory. Imports no torch.

``exchange/lineage.json``         names the run; written by the trainer's first start
``exchange/server-N.json``       where server N listens; written by it when it is ready
``exchange/restart-N.json``      the trainer asks the server with this address to end and be started again
``exchange/request-N.json``      the orchestrator asks for a sync of the trainer's present weights
``exchange/served-N.json``       the trainer's answer to request N
``exchange/learned-N.json``      what the trainer measured in the updates on batch N, before its checkpoint
``exchange/done-N.json``         batch N is trained on, saved in a checkpoint, and served
``exchange/finished.json``       the orchestrator needs nothing more

A file has its name only when complete. Whoever starts again finds all that was said.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from megatron_klong.training.run_directory import replace_text

Said = TypeVar("Said", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lineage(_Message):
    """Names the run in the versions of its weights: the same however often it is started."""

    name: str


class ServerAddress(_Message):
    """Where a server listens.

    Attributes:
        start: differs from start to start, also at the same address.
    """

    url: str
    start: str


class SyncRequest(_Message):
    """Please bring the weights to the servers."""

    number: int


class Served(_Message):
    """Weights that the servers have.

    Attributes:
        iteration: after how many batches.
        version: their tag on the servers.
        difference: largest of a log-prob between trainer and servers.
        bytes: sent to each server.
        seconds: of the sync.
    """

    iteration: int
    version: str
    difference: float
    bytes: int
    seconds: float


class UpdateMetrics(_Message):
    """One optimizer step; means over its trained tokens.

    Attributes:
        balancing_loss: of the routers, without its coefficient; None without it.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    tokens: int
    balancing_loss: float | None
    clipped: float
    ratio: float
    importance: float
    engine_difference: float
    engine_divergence: float


class Learned(_Message):
    """A batch is trained on, but not saved yet; a trainer that dies here learns it again, alike."""

    updates: tuple[UpdateMetrics, ...]
    seconds: float


class Done(_Message):
    """A batch is trained on, and its weights are served."""

    served: Served
    updates: tuple[UpdateMetrics, ...]
    seconds: float


class Finished(_Message):
    """The orchestrator has all it wanted."""


class Exchange:
    """Reads and writes the messages of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, name: str, message: BaseModel) -> None:
        """Write a message; of one with the same name, the later one stays."""
        replace_text(self._folder / f"{name}.json", message.model_dump_json(indent=1) + "\n")

    def heard(self, name: str, kind: type[Said]) -> Said | None:
        """A message, if it was written."""
        try:
            return kind.model_validate_json((self._folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def lineage(self) -> str:
        """The run's name, made at the first call ever."""
        known = self.heard("lineage", Lineage)
        if known is None:
            known = Lineage(name=uuid.uuid4().hex[:8])
            self.tell("lineage", known)
        return known.name

    def last_request(self) -> int:
        """The highest number of a sync request; 0 when there was none."""
        numbers = [int(file.stem.removeprefix("request-")) for file in self._folder.glob("request-*.json")]
        return max(numbers, default=0)

    def servers(self, count: int) -> list[ServerAddress]:
        """Where the servers listen that have said so, but for those that are to be started again."""
        found = []
        for number in range(count):
            address = self.heard(f"server-{number}", ServerAddress)
            if address is not None and address != self.heard(f"restart-{number}", ServerAddress):
                found.append(address)
        return found
