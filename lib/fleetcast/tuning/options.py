"""What the tuning job can be told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fleetcast.backtesting.options import BacktestBudget, SourceOptions
from fleetcast.evaluation.levels import Kind
from fleetcast.models import MODELS, configure
from fleetcast.training.options import FitOptions
from fleetcast.tuning.grids import FIFTHS_GRID, GRIDS, changes_windows

_GRIDS = ("all", *(name for name in GRIDS if name != FIFTHS_GRID))
GridName = Literal[_GRIDS]  # type: ignore[valid-type]


class TuneOptions(SourceOptions):
    """Which grids or which search on which data, and at what cost."""

    grid: GridName | None = None
    """The study: graph-convolution layers, attention heads, sparsity, number of nodes, width of a step
    (window), requests per second (concurrency), or all of them."""
    levels: Kind = "paper"
    """Of the study of concurrency: the paper's levels, in requests per second of the whole cluster, or, for
    clusters of any other size, quantiles: fifths of the test part's time."""
    search: Literal[tuple(MODELS)] | None = None  # type: ignore[valid-type]
    """The model to search the best options of, instead of a grid."""
    trials: int | None = Field(None, ge=1)
    """Configurations that a search tries; 20 if neither these nor minutes are given."""
    minutes: float | None = Field(None, gt=0)
    """Time after which a search tries no more."""
    scheduler: Literal["asha", "pbt"] = "asha"
    """asha: Optuna proposes, and tries that fall behind are stopped. pbt: population-based training, whose
    tries run side by side and take over from the best."""
    space: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Option of the model, learning_rate or weight_decay → choices of a search, in place of those that it has
    by itself; as JSON, or in a file (--config)."""
    name: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the study or search: its page is `tuning/<name>/report.html` in the store."""
    windows: str | None = None
    """A windows dataset of the store instead of a source; grids that need other windows are left out."""
    points: tuple[float, ...] = ()
    """Only these points of a grid; all of them if not given."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model → options other than its defaults, for every point; as JSON, or in a file (--config)."""
    seeds: int = Field(3, ge=1)
    """Trials of each point, or of what a search has found."""
    fit: BacktestBudget = BacktestBudget()
    """How each trial is fitted."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of every trial of a grid."""
    cpus_per_trial: float = Field(1, gt=0)
    """CPUs that Ray keeps for a trial, and its threads; fractions are allowed. Of each worker, if there are
    several."""
    gpus_per_trial: float = Field(0, ge=0)
    """GPUs of a trial; fractions let trials share one. Of each worker, if there are several."""
    workers_per_trial: int = Field(1, ge=1)
    """DDP workers of a trial; each reads its own part of the data. Other workers give other figures. A
    search stops no try half-way that has several."""
    tensorboard: str | None = None
    """A folder for TensorBoard's files, which every node can write to: the losses of each trial, epoch by
    epoch. Not written if not given."""
    max_concurrent: int | None = Field(None, ge=1)
    """Most trials at a time; as many as there are resources for, if not given."""

    @property
    def grids(self) -> list[str]:
        """The grids that are asked for."""
        left_out = "concurrency" if self.levels == "quantiles" else FIFTHS_GRID
        if self.grid == "all":
            return [name for name in GRIDS if name != left_out]
        return [] if self.grid is None else [FIFTHS_GRID if self.grid == left_out else self.grid]

    def fit_options(self, seed: int) -> FitOptions:
        """The fit of one trial."""
        return FitOptions(**self.fit.model_dump(), learning_rate=self.learning_rate, seed=seed)

    @model_validator(mode="after")
    def _grid_or_search(self) -> TuneOptions:
        if (self.grid is None) == (self.search is None):
            raise ValueError("expected exactly one of grid and search")
        return self

    @model_validator(mode="after")
    def _workers(self) -> TuneOptions:
        if self.workers_per_trial > 1 and self.scheduler == "pbt":
            raise ValueError("workers_per_trial: pbt takes over the state of single processes, expected 1")
        if self.workers_per_trial > 1 and self.gpus_per_trial not in (0, 1):
            raise ValueError(f"gpus_per_trial: expected 0 or 1 of each worker, got {self.gpus_per_trial:g}")
        return self

    @model_validator(mode="after")
    def _points_of_one_grid(self) -> TuneOptions:
        if not self.points:
            return self
        if self.grid in (None, "all"):
            raise ValueError(f"points: expected one grid as well, got {self.grid or 'none'}")
        known = GRIDS[self.grids[0]].points
        for point in self.points:
            if point not in known:
                raise ValueError(
                    f"points: {point:g} is none of {self.grid}'s: {', '.join(f'{p:g}' for p in known)}"
                )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> TuneOptions:
        if len(self.given) + (self.windows is not None) != 1:
            raise ValueError("expected exactly one of tabular, raw, synthesize and windows")
        if self.windows is not None and self.grid not in (None, "all") and changes_windows(GRIDS[self.grid]):
            raise ValueError(f"windows: the grid {self.grid} cuts windows of its own, expected a source")
        return self

    @model_validator(mode="after")
    def _known_models(self) -> TuneOptions:
        for name, options in self.options.items():
            configure(name, options)
        return self
