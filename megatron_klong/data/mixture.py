"""The mix of sources that a phase trains on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_klong.config import MixConfig
from megatron_klong.data.dataset import SplitTrajectoryDataset
from megatron_klong.data.rows import SampleName
from megatron_klong.data.windows import StoredWindow

_PACKED_WELL = 1 << 14
"""Windows."""


@dataclass(frozen=True)
class MixedPass:
    """The windows of one pass.

    Attributes:
        sources: the datasets.
        source, window: of each window: which dataset, and which window there.
        lengths: in tokens, int64.
    """

    sources: tuple[SplitTrajectoryDataset, ...]
    source: np.ndarray
    window: np.ndarray
    lengths: np.ndarray

    def packable(self, index: int) -> StoredWindow:
        """Window ``index`` of the pass."""
        return self.sources[self.source[index]].packable(int(self.window[index]))

    def name(self, index: int) -> SampleName:
        """What it is called."""
        return self.sources[self.source[index]].name(int(self.window[index]))


class Mixture:
    """Windows of several sources, pass after pass; each pass has the same share of each, the next of it.

    Megatron's own blend is drawn sample by sample and has no passes: it cannot say that every window came as
    often as wanted.

    Args:
        windows: of each source in a pass; fractions add up over the passes.
        passes: how many there are; None for no end.
        seed: of the order in which a source's windows come, another one each time round.
    """

    def __init__(
        self,
        sources: Sequence[SplitTrajectoryDataset],
        windows: Sequence[float],
        passes: int | None,
        seed: int,
    ) -> None:
        self.sources = tuple(sources)
        self._seed = seed
        self._windows = tuple(windows)
        self.passes = passes

    @classmethod
    def by_epochs(
        cls, sources: Mapping[str, SplitTrajectoryDataset], mixes: Mapping[str, MixConfig], seed: int
    ) -> Mixture:
        """Each window of a source as often as its epochs say, in as many passes as the most of them need."""
        epochs = [mixes[name].epochs or 1.0 for name in sources]
        passes = math.ceil(max(epochs))
        windows = [times * len(part.lengths) / passes for times, part in zip(epochs, sources.values())]
        return cls(tuple(sources.values()), windows, passes, seed)

    @classmethod
    def by_weights(
        cls, sources: Mapping[str, SplitTrajectoryDataset], mixes: Mapping[str, MixConfig], seed: int
    ) -> Mixture:
        """Windows in proportion to the weights, without end.

        A pass has every window once, or of the larger sources a part; but enough to be packed well.
        """
        weights = [mixes[name].weight or 1.0 for name in sources]
        rounds = [len(part.lengths) / weight for weight, part in zip(weights, sources.values())]
        scale = min(max(rounds), max(min(rounds), _PACKED_WELL / sum(weights)))
        return cls(tuple(sources.values()), [weight * scale for weight in weights], None, seed)

    @property
    def tokens(self) -> float:
        """Of a pass, from the mean length of each source's windows."""
        return float(sum(count * part.lengths.mean() for count, part in zip(self._windows, self.sources)))

    def epoch(self, number: int) -> MixedPass:
        """The windows of a pass, from 0."""
        chosen = []
        for place, per_pass in enumerate(self._windows):
            # Rounded like this the passes have together what all of them should have, whatever the fraction.
            chosen.append(self._order(place, round(per_pass * number), round(per_pass * (number + 1))))
        return MixedPass(
            self.sources,
            np.repeat(np.arange(len(chosen)), [len(windows) for windows in chosen]),
            np.concatenate(chosen),
            np.concatenate([source.lengths[windows] for source, windows in zip(self.sources, chosen)]),
        )

    def _order(self, place: int, first: int, last: int) -> np.ndarray:
        """Windows ``first`` to ``last`` of a source that is gone through again and again, shuffled each."""
        size = len(self.sources[place].lengths)
        parts = [np.empty(0, dtype=np.int64)]
        for times in range(first // size, -(-last // size)):
            shuffled = np.random.default_rng([self._seed, place, times]).permutation(size)
            start = times * size
            parts.append(shuffled[max(first - start, 0) : last - start])
        return np.concatenate(parts)
