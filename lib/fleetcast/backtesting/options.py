"""What a backtest can be told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fleetcast.config import Options
from fleetcast.ingest.options import IngestOptions
from fleetcast.models import MODELS
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.traces.tabular import TabularOptions
from fleetcast.training.options import FitOptions
from fleetcast.windows.manifest import ShardOptions


class SourceOptions(Options):
    """Where a data set comes from: exactly one of a table, raw files, and a synthetic cluster."""

    tabular: TabularOptions | None = None
    """A table of any origin, with the names of its columns."""
    raw: str | None = None
    """Raw files of a known trace: a folder, a file or `s3://bucket/prefix`."""
    synthesize: SynthesizeOptions | None = None
    """A synthetic cluster."""
    ingest: IngestOptions = IngestOptions()
    """How raw files, synthetic ones too, are read."""
    shard: ShardOptions = ShardOptions()
    """Which windows are made of it."""

    @property
    def given(self) -> list[str]:
        """The origins that are named."""
        return [name for name in ("tabular", "raw", "synthesize") if getattr(self, name) is not None]


class BacktestOptions(SourceOptions):
    """Which models on which data, and at what cost."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the backtest: its report is `backtests/<name>/report.html` in the store."""
    windows: tuple[str, ...] = ()
    """Windows datasets of the store; without these and any source below, the one called default."""
    data: dict[str, SourceOptions] = Field(default_factory=dict)
    """Further data sets by name, each with a source of its own."""
    models: tuple[str, ...] = tuple(MODELS)
    """Models to test; the naive rungs are always there."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model → options other than its defaults."""
    seeds: int = Field(3, ge=1)
    """Trials of each model and data set; a model without randomness has one."""
    fit: FitOptions = FitOptions(epochs=12, patience=3, steps_per_epoch=150)
    """How each model is fitted; its seed is the trial's."""
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    """The search: each model tries these on each data set and keeps the best on the validation part."""
    search_epochs: int = Field(3, ge=1)
    """Epochs of each of these tries."""
    lift: tuple[str, ...] = ()
    """Graph models that are also trained on no graph, a shuffled and a learned one."""
    paper: Literal["fusion", "stgnn"] | None = None
    """Runs exactly the models of a paper's table, in their published form, instead of `models`."""
    cpus_per_trial: float = Field(1, gt=0)
    """CPUs that Ray keeps for a trial; fractions are allowed."""
    gpus_per_trial: float = Field(0, ge=0)
    """GPUs of a trial; fractions let trials share one."""
    max_concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; as many as there are resources for, if not given."""
    rerun: str | None = None
    """A trial's folder in the store: runs this one trial again, on its own, and prints what it gives."""

    @model_validator(mode="after")
    def _known(self) -> BacktestOptions:
        for name in (*self.models, *self.options, *self.lift):
            if name not in MODELS:
                raise ValueError(f"unknown model {name!r}, expected some of {', '.join(sorted(MODELS))}")
        for name in self.lift:
            if "graph" not in MODELS[name].model_fields:
                raise ValueError(f"lift: {name} reads no graph")
        sources = ({"the source": self} if self.given else {}) | self.data
        for name, source in sources.items():
            if len(source.given) != 1:
                raise ValueError(
                    f"{name}: expected exactly one of tabular, raw and synthesize, got "
                    f"{' and '.join(source.given) or 'none'}"
                )
        return self
