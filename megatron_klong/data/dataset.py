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
from megatron_klong.data.header import held_out_trajectories, window_rule
from megatron_klong.data.store import TokenStore
from megatron_klong.data.windows import (
    TrainingSample,
    WindowAssembler,
    split_trajectory,
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
        self._windows = [
            (int(number), window)
            for number in indices
            for window in split_trajectory(dataset, int(number), rule, config.window).windows
            if window.trained_turns
        ]
        self.lengths = np.array([window.tokens for _, window in self._windows], dtype=np.int64)
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
        return self.num_samples or len(self._windows)

    def sample(self, index: int) -> TrainingSample:
        """Window ``index``, counted on over the end."""
        number, window = self._windows[index % len(self._windows)]
        return self._assembler.sample(window, self._store.trajectory(number), number)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """The same as a mapping, which is what Megatron's blending wants."""
        return dict(vars(self.sample(idx)))


def build_datasets(
    config: DataConfig, seed: int
) -> tuple[SplitTrajectoryDataset, SplitTrajectoryDataset | None]:
    """Train and validation windows of a store, no trajectory in both.

    Raises:
        ValueError: the store cannot be read or has too few trajectories for the split, or nothing
            in it can be trained.
    """
    store = TokenStore(config.store)
    held_out = held_out_trajectories(config, len(store))
    megatron_config = SplitTrajectoryDatasetConfig(
        random_seed=seed,
        sequence_length=config.row_length,
        blend=([str(config.store)], None),
        split=f"{len(store) - held_out},{held_out},0",
        window=config.window,
        window_key=config.window.model_dump_json(),
        store_hashes=(store.header.content_sha256,),
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(
        SplitTrajectoryDataset, [None, None, None], lambda: True, megatron_config
    ).build()
    for name, dataset in (("train", train), ("validation", validation)):
        if dataset is not None and not len(dataset):
            raise ValueError(
                f"data.store={config.store}: no {name} trajectory has a trainable token under "
                "data.window; `klong data split` tells why"
            )
    return train, validation
