"""What a backtest can be told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fleetcast.config import Options
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.sources import SourceShardOptions
from fleetcast.models import MODELS, configure
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.training.options import Budget, FitOptions

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


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
    shard: SourceShardOptions = SourceShardOptions()
    """Which windows are made of it. What is not given of a table's is taken from the table: its level and
    metrics; the step of its telemetry; a horizon of 12 steps, or a tenth of a table of fewer than 120; and a
    look-back as long as that, or as the horizon that is given. Lags of a day and a week are kept where the
    training part is long enough, as everywhere."""

    @property
    def given(self) -> list[str]:
        """The origins that are named."""
        return [name for name in ("tabular", "raw", "synthesize") if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _windows_fit(self) -> SourceOptions:
        of_services = self.synthesize is not None and self.synthesize.trace == "services"
        if self.tabular is None and not of_services:  # a table's are only known once it is read
            self.shard.resolve({})
        return self


class BacktestBudget(Budget):
    """How each model of a backtest is fitted: its learning rate is the search's, its seed the trial's."""

    epochs: int = Field(12, ge=1)
    """Most passes over the training part."""
    patience: int = Field(3, ge=1)
    """Epochs without a better validation loss before training stops."""
    steps_per_epoch: int | None = Field(150, ge=1)
    """Batches of an epoch, drawn anew each time; all of them where null."""


class BacktestOptions(SourceOptions):
    """Which models on which data, and at what cost."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the backtest: its report is `backtests/<name>/report.html` in the store."""
    windows: tuple[str, ...] = ()
    """Windows datasets of the store; without these and any source below, the one called default."""
    data: dict[str, SourceOptions] = Field(default_factory=dict)
    """Further data sets by name, each with a source of its own; best given in a file (--config)."""
    models: tuple[str, ...] = tuple(MODELS)
    """Models to test; the naive rungs are always there."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model → options other than its defaults; as JSON, or in a file (--config)."""
    seeds: int = Field(3, ge=1)
    """Trials of each model and data set; a model without randomness has one."""
    fit: BacktestBudget = BacktestBudget()
    """How each model is fitted."""
    learning_rates: tuple[float, ...] = Field((5e-4, 2e-3), min_length=1)
    """The search: each model tries these on each data set and keeps the best on the validation part."""
    search_epochs: int = Field(3, ge=1)
    """Epochs of each of these tries."""
    lift: tuple[str, ...] = ()
    """Graph models that are also trained on no graph, a shuffled and a learned one."""
    paper: Literal["fusion", "stgnn"] | None = None
    """Runs the models of a paper's table in their published form instead of `models`, with ridge and LightGBM
    beside them."""
    cpus_per_trial: float = Field(1, gt=0)
    """CPUs that Ray keeps for a trial, and its threads; fractions are allowed."""
    gpus_per_trial: float = Field(0, ge=0)
    """GPUs of a trial; fractions let trials share one."""
    max_concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; as many as there are resources for, if not given."""
    rerun: str | None = None
    """A trial's folder, `trials/…` below `backtests/` of the store: runs this one trial again as its manifest
    says, on the data that the store has, and prints its errors and whether it gives the same scores."""

    @property
    def sources(self) -> dict[str, SourceOptions]:
        """The data sets to make, by name: the one of the backtest's own source is called as its windows."""
        return ({self.shard.windows: self} if self.given else {}) | self.data

    def fit_options(self, learning_rate: float, seed: int, epochs: int | None = None) -> FitOptions:
        """The fit of one trial, or of a try of the search, which has fewer epochs."""
        budget = self.fit.model_dump() | ({} if epochs is None else {"epochs": epochs})
        return FitOptions(**budget, learning_rate=learning_rate, seed=seed)

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if min(rates) <= 0:
            raise ValueError("expected learning rates above 0")
        return rates

    @model_validator(mode="after")
    def _known_models(self) -> BacktestOptions:
        for name in (*self.models, *self.options, *self.lift):
            if name not in MODELS:
                raise ValueError(f"unknown model {name!r}, expected some of {', '.join(sorted(MODELS))}")
        _once("models", self.models)
        for name, options in self.options.items():
            configure(name, options)
        return self

    @model_validator(mode="after")
    def _liftable(self) -> BacktestOptions:
        if self.lift and self.paper:
            raise ValueError("lift: a paper's experiment is run as it is, leave one of lift and paper out")
        _once("lift", self.lift)
        for name in self.lift:
            if "graph" not in MODELS[name].model_fields:
                raise ValueError(f"lift: {name} reads no graph")
            if name not in self.models:
                raise ValueError(f"lift: {name} is not among the models {', '.join(self.models)}")
            if "graph" in self.options.get(name, {}):
                raise ValueError(f"lift: {name} is trained on every graph, leave its option graph out")
        return self

    @model_validator(mode="after")
    def _one_source_each(self) -> BacktestOptions:
        sources = ({"the source": self} if self.given else {}) | self.data
        for name, source in sources.items():
            if len(source.given) != 1:
                raise ValueError(
                    f"{name}: expected exactly one of tabular, raw and synthesize, got "
                    f"{' and '.join(source.given) or 'none'}"
                )
        for name in self.data:
            if not _NAME.fullmatch(name):
                raise ValueError(f"data: {name!r} cannot be a folder, expected letters, digits, _, . and -")
        own = (self.shard.windows,) if self.given else ()
        _once("the names of data sets", (*self.windows, *own, *self.data))
        return self


def _once(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: {name} is there twice, expected each once")
