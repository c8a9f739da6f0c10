"""The parallel layout."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel


class ParallelConfig(StrictModel):
    """How many ways each kind of parallelism splits the work. Ranks beyond TP x CP x PP are data parallel."""

    tensor: int = Field(default=1, ge=1)
    """TP: ranks that share every layer. Above 1, sequence parallelism is on."""

    pipeline: int = Field(default=1, ge=1)
    """PP: ranks that the layers are spread over."""

    virtual: int = Field(default=1, ge=1)
    """VPP: stages on each pipeline rank, which take turns (interleaved 1F1B). The pipeline fills so many
    times faster, for more that is sent and kept; micro-batches come in multiples of PP."""

    context: int = Field(default=1, ge=1)
    """CP: ranks that share the tokens of every row."""

    expert: int = Field(default=1, ge=1)
    """EP: ranks that share the experts of a layer, taken from the TP x CP x DP ranks of a stage."""

    nproc: int | None = Field(default=None, ge=1)
    """Ranks that `klong sft` starts on this node. Default: the fewest that the layout allows."""

    @property
    def world_size(self) -> int:
        """Ranks on one node: ``nproc``, or the smallest multiple of TP x CP x PP that EP divides."""
        return self.nproc or self.pipeline * math.lcm(self.tensor * self.context, self.expert)

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into; part ``n`` is on pipeline rank ``n % pipeline``."""
        return self.pipeline * self.virtual

    @property
    def micro_batch_divisor(self) -> int:
        """What the micro-batches of a step must be a multiple of: interleaved stages take PP in turn."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def row_divisor(self) -> int:
        """What the length of a row must be a multiple of, for its ranks to share it."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def data(self, world_size: int) -> int:
        """DP: how many copies of the model ``world_size`` ranks hold."""
        return world_size // (self.tensor * self.context * self.pipeline)

    def described(self, world_size: int) -> str:
        """For a person."""
        return f"{world_size} ranks: {self.name(world_size)}"

    def name(self, world_size: int) -> str:
        """``TP2 CP4 PP4 VPP2 EP8 DP1``; without VPP where stages are not interleaved."""
        interleaved = f" VPP{self.virtual}" if self.virtual > 1 else ""
        return (
            f"TP{self.tensor} CP{self.context} PP{self.pipeline}{interleaved} EP{self.expert} "
            f"DP{self.data(world_size)}"
        )

    def check(self, world_size: int) -> None:
        """Refuse a number of ranks that the layout does not divide.

        Raises:
            ValueError: names the fields and what would fit.
        """
        stage, rest = divmod(world_size, self.pipeline)
        if rest or stage % (self.tensor * self.context) or stage % self.expert:
            raise ValueError(
                f"parallel: {world_size} ranks cannot hold tensor={self.tensor} x context={self.context} x "
                f"pipeline={self.pipeline} with expert={self.expert}; use a multiple of "
                f"{self.pipeline * math.lcm(self.tensor * self.context, self.expert)} ranks"
            )

    @model_validator(mode="after")
    def _fits(self) -> ParallelConfig:
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual={self.virtual} interleaves stages of a pipeline, and pipeline is 1")
        self.check(self.world_size)
        return self
