"""What a backtest found: rungs on data sets, their standing, and the figures that tables and plots show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fleetcast.evaluation import metrics as m
from fleetcast.evaluation.backtest import Measured
from fleetcast.evaluation.compare import Gap, Ranked, Resampled, block_length, ranking, resample
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.naive import skill_rung
from fleetcast.evaluation.peaks import Peaks, by_time_of_day
from fleetcast.windows.graph import LastGraph

Family = Literal["naive", "statistical", "sequence", "graph"]

#: Plots show so many of the best rungs, beside RIDGE and the best naive one.
SHOWN = 5
RIDGE = "ridge"
TRUE = "true"
#: The graphs that others are held against: every entity on its own, and true dependencies between wrong ones.
IDENTITY, SHUFFLED = "identity", "shuffled"


@dataclass(frozen=True)
class Cost:
    """What one seed of a rung costs, None where it was not measured or there is nothing to learn."""

    parameters: int | None = None
    epochs: float | None = None
    seconds_per_epoch: float | None = None
    fit_seconds: float | None = None
    forecast_ms: float | None = None
    """Milliseconds to forecast one window of one group."""


@dataclass(frozen=True)
class Rung:
    """One rung on one data set."""

    name: str
    family: Family
    seeds: Mapping[int, Measured]
    """What the test part says of each seed; none if all of them were stopped."""
    cost: Cost = Cost()

    @property
    def scores(self) -> Scores:
        """All seeds added up."""
        return reduce(add, (found.scores for found in self.seeds.values()))

    @property
    def peaks(self) -> Peaks | None:
        """All seeds added up; None where no thresholds were given."""
        found = [found.peaks for found in self.seeds.values() if found.peaks is not None]
        return reduce(add, found) if found else None

    def figures(self, data: DataSet) -> list[dict[str, list[float]]]:
        """Per metric, figure → its value for each seed, over the whole horizon; NaN where undefined.

        The figures of `metrics.figures`, and `median_scaled_mae`, of the median entity.
        """
        tables = [m.figures(found.scores, data.mase_scale) for found in self.seeds.values()]
        unknown = np.full(len(data.metrics), np.nan)
        medians = np.array(
            [unknown if one.entities is None else one.entities.median() for one in self.seeds.values()]
        )
        return [
            {name: [_float(table[f][name]) for table in tables] for name in tables[0][f]}
            | {"median_scaled_mae": medians[:, f].tolist()}
            for f in range(len(data.metrics))
        ]


@dataclass(frozen=True)
class DataSet:
    """One data set and the rungs that were tried on it: same look-back, split and mask for all."""

    name: str
    description: str
    metrics: tuple[str, ...]
    """F metrics."""
    normalised: tuple[str, ...]
    """Those whose unit nobody knows."""
    std: NDArray[np.float64]
    """[F] standard deviation of the training part."""
    mase_scale: NDArray[np.float64]
    """[F] mean absolute seasonal difference of the training part."""
    start: int
    """Unix seconds of step 0."""
    step: int
    """Seconds of a step."""
    horizon: int
    """H, steps."""
    split: str
    """In words."""
    entities: int
    windows: int
    """Of the test part."""
    rungs: Sequence[Rung]
    graph: LastGraph | None = None
    """Who depends on whom at its end; None where there are no edges."""


@dataclass(frozen=True)
class Standing:
    """The rungs of one data set compared."""

    data: DataSet
    places: list[Ranked]
    """Best first; without the rungs that were stopped."""
    resampled: Resampled | None
    """None if no rung was scored."""

    @classmethod
    def of(cls, data: DataSet) -> Standing:
        """Compares the rungs. Raises InputError if they did not count the same targets."""
        rungs = {
            rung.name: [found.by_origin for found in rung.seeds.values()] for rung in data.rungs if rung.seeds
        }
        if not rungs:
            return cls(data, [], None)
        origins = next(iter(rungs.values()))[0]
        resampled = resample(rungs, block_length(origins, data.horizon, data.step))
        return cls(data, ranking(resampled), resampled)

    @cached_property
    def rungs(self) -> dict[str, Rung]:
        """Name → rung, best first."""
        known = {rung.name: rung for rung in self.data.rungs}
        return {place.name: known[place.name] for place in self.places}

    @property
    def stopped(self) -> list[Rung]:
        """The rungs of which no seed came to an end."""
        return [rung for rung in self.data.rungs if not rung.seeds]

    @property
    def against(self) -> str | None:
        """The rung that skill is measured against."""
        return skill_rung(list(self.rungs))

    @property
    def naive(self) -> str | None:
        """The best naive rung."""
        return self.best("naive")

    def best(self, family: Family) -> str | None:
        """The best rung of a family."""
        return next((name for name, rung in self.rungs.items() if rung.family == family), None)

    @property
    def shown(self) -> list[str]:
        """The few rungs that plots show, best first."""
        chosen = {*list(self.rungs)[:SHOWN], RIDGE, self.naive}
        return [name for name in self.rungs if name in chosen]

    def gap(self, name: str | None, other: str | None) -> Gap | None:
        """A rung against another; None where either was not scored or both are the same."""
        if self.resampled is None or name == other or name not in self.rungs or other not in self.rungs:
            return None
        return self.resampled.compare(name, other)

    def errors(self, name: str) -> list[float]:
        """Mean over metrics of the scaled MAE, of each seed."""
        by_metric = [figures["scaled_mae"] for figures in self.rungs[name].figures(self.data)]
        return _mean_over(np.array(by_metric)).tolist()

    def by_horizon(self, name: str) -> NDArray[np.float64]:
        """[H] mean over metrics of the scaled MAE."""
        return _mean_over(m.scaled_mae(self.rungs[name].scores).T)

    def by_time(self, name: str) -> NDArray[np.float64]:
        """[buckets] mean over metrics and seeds of the scaled MAE by the target's time of day."""
        data = self.data
        buckets = max(1, min(24, 86_400 // data.step))
        found = [
            by_time_of_day(seed.by_origin, data.start, data.step, buckets)
            for seed in self.rungs[name].seeds.values()
        ]
        return _mean_over(np.mean(found, axis=0).T)

    def calibration(self, name: str) -> NDArray[np.float64]:
        """[Q] mean over metrics of the share of targets at or below each quantile."""
        return _mean_over(m.calibration(self.rungs[name].scores.pooled())[0])


@dataclass(frozen=True)
class GraphLift:
    """One graph model on one data set, told to see some of the true, identity, shuffled and learned graph."""

    model: str
    standing: Standing
    """Of all variants, beside whatever else."""
    rungs: Mapping[str, str]
    """Graph → its rung's name."""

    @property
    def errors(self) -> dict[str, list[float]]:
        """Graph → mean over metrics of the scaled MAE, of each seed."""
        return {graph: self.standing.errors(rung) for graph, rung in self.rungs.items()}

    def against(self, other: str) -> dict[str, Gap]:
        """Graph → its error less that of the other graph; without those that were not scored."""
        gaps = {graph: self.standing.gap(rung, self.rungs.get(other)) for graph, rung in self.rungs.items()}
        return {graph: gap for graph, gap in gaps.items() if gap}


def _float(value: float | None) -> float:
    return np.nan if value is None else value


def _mean_over(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the first axis of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    return m.ratio(np.where(known, values, 0).sum(0), known.sum(0))
