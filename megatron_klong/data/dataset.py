"""Windows of a token store as a Megatron-Core dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.blended_megatron_dataset_config import (
    BlendedMegatronDatasetConfig,
)
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_klong.config import DataConfig, WindowConfig
from megatron_klong.data.header import held_out_trajectories, read_headers, window_rule
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
        store_hashes: content hashes of the blended stores, likewise.
    """

    window: WindowConfig
    window_key: str
    store_hashes: tuple[str, ...]


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
        return [*MegatronDataset._key_config_attributes(), "window_key", "store_hashes"]

    def __len__(self) -> int:
        return self.num_samples or len(self._places)

    def packable(self, index: int) -> StoredWindow:
        """Window ``index``, counted on over the end."""
        place = int(self._places[index % len(self._places)])
        number = int(self._windows.numbers[self._windows.table.trajectory[place]])
        window = self._windows.table.window(place)
        return self._assembler.stored(window, self._store.trajectory(number), number)

    def sample(self, index: int) -> TrainingSample:
        """Tokens and loss mask of window ``index``."""
        stored = self.packable(index)
        return self._assembler.sample(stored.window, stored.blocks, stored.trajectory)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """The same as a mapping, which is what Megatron's blending wants."""
        return dict(vars(self.sample(idx)))


class BlendedWindows:
    """Windows of several stores in the order that Megatron blends them."""

    def __init__(self, blended: BlendedDataset) -> None:
        self._blended = blended
        lengths = [dataset.lengths for dataset in blended.datasets]
        self.lengths = np.empty(len(blended), dtype=np.int64)
        """Tokens of every window, int64."""
        for number, of_source in enumerate(lengths):
            places = blended.dataset_index == number
            self.lengths[places] = of_source[blended.dataset_sample_index[places] % len(of_source)]

    def __len__(self) -> int:
        return len(self._blended)

    def packable(self, index: int) -> StoredWindow:
        """Window ``index`` of the blend."""
        source = self._blended.datasets[self._blended.dataset_index[index]]
        stored: StoredWindow = source.packable(int(self._blended.dataset_sample_index[index]))
        return stored

    def sample(self, index: int) -> TrainingSample:
        """Tokens and loss mask of window ``index`` of the blend."""
        stored = self.packable(index)
        return stored.assembler.sample(stored.window, stored.blocks, stored.trajectory)


Windows = SplitTrajectoryDataset | BlendedWindows


def build_datasets(config: DataConfig, seed: int) -> tuple[Windows, Windows | None]:
    """Train and validation windows, no trajectory in both.

    Raises:
        ValueError: a store cannot be read or has too few trajectories for the split, or nothing
            in it can be trained.
    """
    read_headers(config)
    stores = [TokenStore(store) for store in config.stores]
    weights = None
    sizes: Sequence[int | None] = (None, None, None)
    if config.blend:
        # An epoch has each window of the first store, whose weight is 1, once.
        weights = [1.0, *(source.weight for source in config.blend)]
        sizes = [round(size * sum(weights)) for size in _windows_of_first(config, stores[0])]
    held_out = held_out_trajectories(config.store, config.validation_fraction, len(stores[0]))
    megatron_config = SplitTrajectoryDatasetConfig(
        random_seed=seed,
        sequence_length=config.row_length,
        blend=([str(store) for store in config.stores], weights),
        split=f"{len(stores[0]) - held_out},{held_out},0",
        window=config.window,
        window_key=config.window.model_dump_json(),
        store_hashes=tuple(store.header.content_sha256 for store in stores),
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(
        SplitTrajectoryDataset, sizes, lambda: True, megatron_config
    ).build()
    return _usable(train, "train", config), validation and _usable(validation, "validation", config)


def _usable(dataset: SplitTrajectoryDataset | BlendedDataset, name: str, config: DataConfig) -> Windows:
    sources = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
    for store, source in zip(config.stores, sources):
        if not len(source.lengths):
            raise ValueError(
                f"store {store}: no {name} trajectory has a trainable token under data.window; "
                "`klong data split` tells why"
            )
    return BlendedWindows(dataset) if isinstance(dataset, BlendedDataset) else dataset


def _windows_of_first(config: DataConfig, store: TokenStore) -> tuple[int, int, int]:
    """How many windows of the first store are trained on, held out, and left for tests: none."""
    held_out = held_out_trajectories(config.store, config.validation_fraction, len(store))
    split = split_store(store, window_rule(config.window, store.header), config.window)
    owners = split.table.trajectory[split.table.trains]
    training = int((owners < len(store) - held_out).sum())
    return training, len(owners) - training, 0
