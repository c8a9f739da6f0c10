"""Windows of a token store as a Megatron-Core dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.blended_megatron_dataset_config import (
    BlendedMegatronDatasetConfig,
)
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_klong.config import DataConfig, WindowConfig
from megatron_klong.data.header import StoreHeader, held_out_trajectories, read_headers, window_rule
from megatron_klong.data.rows import SampleName
from megatron_klong.data.store import TokenStore
from megatron_klong.data.windows import (
    StoredWindow,
    TrainingSample,
    WindowAssembler,
    split_store,
)


@dataclass(kw_only=True)
class SplitTrajectoryDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's dataset config with everything that changes the windows.

    Attributes:
        window: the window settings.
        window_key: the same as JSON: Megatron hashes it into the identity of the index.
        store_hash: content hash of the store, likewise.
        source: what the run calls the store.
    """

    window: WindowConfig
    window_key: str
    store_hash: str
    source: str


class SplitTrajectoryDataset(MegatronDataset):
    """The windows of some trajectories of a store, in order; items wrap around over epochs.

    Train and validation take different *trajectories*: Megatron splits what
    ``numel_low_level_dataset`` counts. A window that trains nothing is left out.
    """

    def __init__(
        self,
        dataset: TokenStore,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: SplitTrajectoryDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        rule = window_rule(config.window, dataset.header)
        self._store = dataset
        self._assembler = WindowAssembler(rule, dataset.header)
        self._source = config.source
        self._windows = split_store(dataset, rule, config.window, np.asarray(indices))
        self._places = np.flatnonzero(self._windows.table.trains)
        self.lengths = self._windows.table.tokens[self._places]
        """Tokens of every window, int64."""

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: TokenStore) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> TokenStore:
        return TokenStore(Path(dataset_path))

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), "window_key", "store_hash"]

    def __len__(self) -> int:
        return self.num_samples or len(self._places)

    def epoch(self, number: int) -> SplitTrajectoryDataset:
        """The samples of an epoch: all of them, in each."""
        return self

    def packable(self, index: int) -> StoredWindow:
        """Window ``index``, counted on over the end."""
        place = int(self._places[index % len(self._places)])
        number = int(self._windows.numbers[self._windows.table.trajectory[place]])
        blocks = self._store.trajectory(number)
        window = self._windows.table.window(place)
        return self._assembler.stored(window, blocks, number, f"{self._source}/{blocks.label.id}")

    def name(self, index: int) -> SampleName:
        """What window ``index`` is called, without its tokens."""
        place = int(self._places[index % len(self._places)])
        number = int(self._windows.numbers[self._windows.table.trajectory[place]])
        label = self._store.labels[number].id
        return f"{self._source}/{label}", int(self._windows.table.number[place])

    def sample(self, index: int) -> TrainingSample:
        """Tokens and loss mask of window ``index``."""
        stored = self.packable(index)
        return self._assembler.sample(stored.window, stored.blocks, stored.trajectory)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """The same as a mapping, which is what Megatron's blending wants."""
        return dict(vars(self.sample(idx)))


@dataclass(frozen=True)
class SourceWindows:
    """The windows of one source; no trajectory is in both parts."""

    train: SplitTrajectoryDataset
    validation: SplitTrajectoryDataset | None


def build_datasets(config: DataConfig, seed: int) -> dict[str, SourceWindows]:
    """Train and validation windows of every source by name, built by Megatron.

    Raises:
        ValueError: a store cannot be read or has too few trajectories for the split, or nothing
            in it can be trained.
    """
    return {
        name: _source_windows(config, name, header, seed) for name, header in read_headers(config).items()
    }


def _source_windows(config: DataConfig, name: str, header: StoreHeader, seed: int) -> SourceWindows:
    held_out = held_out_trajectories(config, name, header.trajectories)
    megatron_config = SplitTrajectoryDatasetConfig(
        random_seed=seed,
        sequence_length=config.row_length,
        blend=([str(config.sources[name].store)], None),
        split=f"{header.trajectories - held_out},{held_out},0",
        window=config.window,
        window_key=config.window.model_dump_json(),
        store_hash=header.content_sha256,
        source=name,
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(
        SplitTrajectoryDataset, [None, None, None], lambda: True, megatron_config
    ).build()
    for part, dataset in (("train", train), ("validation", validation)):
        if dataset is not None and not len(dataset.lengths):
            raise ValueError(
                f"data.sources.{name}: no {part} trajectory of {config.sources[name].store} has a trainable "
                "token under data.window; `klong data split` tells why"
            )
    return SourceWindows(train, validation)
