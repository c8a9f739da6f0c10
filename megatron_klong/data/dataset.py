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

    def epoch(self, number: int) -> SplitTrajectoryDataset:
        """The samples of an epoch: all of them, in each."""
        return self

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


@dataclass(frozen=True)
class BlendedEpoch:
    """The windows of one epoch of a blend.

    Attributes:
        sources: the blended datasets.
        source, window: of each: which of them, and which window there.
        lengths: in tokens, int64.
    """

    sources: tuple[SplitTrajectoryDataset, ...]
    source: np.ndarray
    window: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def packable(self, index: int) -> StoredWindow:
        """Window ``index`` of the epoch."""
        return self.sources[self.source[index]].packable(int(self.window[index]))


class BlendedWindows:
    """Windows of several stores: in each epoch all of the first, and of the others the next by their weights.

    Megatron builds and blends the datasets by sample; which samples an epoch has is decided here, since its
    blend has no epochs: it would bring the same part of a large store again and again.
    """

    def __init__(self, blended: BlendedDataset, weights: Sequence[float]) -> None:
        self.sources = tuple(blended.datasets)
        sizes = [len(source.lengths) for source in self.sources]
        self._counts = [sizes[0], *(max(1, round(weight * sizes[0])) for weight in weights)]
        self._sizes = sizes

    def __len__(self) -> int:
        return sum(self._counts)

    def epoch(self, number: int) -> BlendedEpoch:
        """The windows of an epoch, from 0."""
        windows = [
            (number * count + np.arange(count)) % size for count, size in zip(self._counts, self._sizes)
        ]
        return BlendedEpoch(
            self.sources,
            np.repeat(np.arange(len(windows)), self._counts),
            np.concatenate(windows),
            np.concatenate([source.lengths[chosen] for source, chosen in zip(self.sources, windows)]),
        )


Windows = SplitTrajectoryDataset | BlendedWindows


def build_datasets(config: DataConfig, seed: int) -> tuple[Windows, Windows | None]:
    """Train and validation windows, no trajectory in both.

    Raises:
        ValueError: a store cannot be read or has too few trajectories for the split, or nothing
            in it can be trained.
    """
    headers = read_headers(config)
    held_out = held_out_trajectories(config.store, config.validation_fraction, headers[0].trajectories)
    megatron_config = SplitTrajectoryDatasetConfig(
        random_seed=seed,
        sequence_length=config.row_length,
        blend=([str(store) for store in config.stores], None),
        split=f"{headers[0].trajectories - held_out},{held_out},0",
        window=config.window,
        window_key=config.window.model_dump_json(),
        store_hashes=tuple(header.content_sha256 for header in headers),
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(
        SplitTrajectoryDataset, [None, None, None], lambda: True, megatron_config
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
    if not isinstance(dataset, BlendedDataset):
        return dataset
    return BlendedWindows(dataset, [source.weight for source in config.blend])
