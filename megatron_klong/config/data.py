"""What a supervised run is trained on: sources, mixed in phases."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel
from megatron_klong.config.window import WindowConfig


class SourceConfig(StrictModel):
    """One store of trajectories; general chat data are trajectories too."""

    store: Path
    """PREFIX of a token store, as written by `klong data tokenize`; all of a run with the same tokenizer."""

    validation_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of its trajectories that is held out. Default: `data.validation_fraction`."""


class MixConfig(StrictModel):
    """How much of a source a phase has: `epochs` in a phase that ends with its data, `weight` in one that has
    a number of steps."""

    epochs: float | None = Field(default=None, gt=0)
    """How often each of its windows comes in the phase, 1 by default. With 2.5, half of them come thrice."""

    weight: float | None = Field(default=None, gt=0)
    """Its windows for each window of a source with weight 1, which is the default."""


class PhaseConfig(StrictModel):
    """A stretch of the run with one mix of sources."""

    sources: dict[str, MixConfig] = {}
    """Mix by name of the source. Default: all sources, each with the default of its mix."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; the sources are then repeated as long as it takes. Default: as many as the epochs of
    its sources make."""

    @model_validator(mode="after")
    def _mixes_fit(self) -> PhaseConfig:
        wrong = "epochs" if self.steps else "weight"
        for name, mix in self.sources.items():
            if getattr(mix, wrong) is not None:
                remedy = "a weight, or no steps" if self.steps else "its epochs, or a number of steps"
                raise ValueError(
                    f"source {name} has {wrong}={getattr(mix, wrong)} in a phase "
                    f"{'with' if self.steps else 'without'} steps; give it {remedy}"
                )
        return self


class DataConfig(StrictModel):
    """What is trained on."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Stores by a name of your choice."""

    phases: dict[str, PhaseConfig] = {"train": PhaseConfig()}
    """One after the other, in this order. Default: every source once."""

    window: WindowConfig
    """How trajectories are split."""

    row_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a packed row, which is one micro-batch. Default: the window's max_tokens."""

    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of each source's trajectories that is held out, the last ones of its store. 0 holds out none."""

    @model_validator(mode="after")
    def _sources_known(self) -> DataConfig:
        if not self.phases:
            raise ValueError("data.phases: name at least one phase, or leave the key out")
        for phase, settings in self.phases.items():
            for name in settings.sources:
                if name not in self.sources:
                    raise ValueError(
                        f"data.phases.{phase}.sources.{name}: no such source; data.sources has "
                        f"{', '.join(self.sources)}"
                    )
        return self

    @property
    def row_length(self) -> int:
        """Tokens of a packed row, resolved."""
        return self.row_tokens or self.window.max_tokens

    def mixes(self, phase: str) -> dict[str, MixConfig]:
        """The sources of a phase, resolved."""
        return self.phases[phase].sources or {name: MixConfig() for name in self.sources}

    def held_out(self, source: str) -> float:
        """Share of a source's trajectories that is held out, resolved."""
        own = self.sources[source].validation_fraction
        return self.validation_fraction if own is None else own

    @property
    def fixed_steps(self) -> int | None:
        """Optimizer steps of all phases, where none of them follows from the data."""
        steps = [phase.steps for phase in self.phases.values()]
        return None if None in steps else sum(step for step in steps if step)
