"""Sensitivity studies: what one setting of a model or of its data does to the error, and the paper's claim.

    study = Study(grid, "los-loop", {1: {"mape": [0.11, 0.12, 0.11]}, 2: …}, …)
    study.verdict          # agrees, differs, or flat within noise
    render([study], "…")   # the page, with a figure in the paper's form
    Study.from_json(grid, study.to_json())

A point is one value of the setting. What chance makes of a point is known from its seeds alone, and all
points have the same ones: what a seed does to all points alike, its initial weights and its order of windows,
is no difference between points and is taken out (a randomised block design, the seeds being the blocks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fleetcast import plots
from fleetcast.evaluation import document
from fleetcast.evaluation.document import Pages, Section, Table
from fleetcast.evaluation.page import Picture, number, percent

#: Of two-sided intervals and tests.
CONFIDENCE = 0.95
TITLES = {"mse": "MSE", "mae": "MAE", "mape": "MAPE", "rmse": "RMSE", "r2": "R²"}
_SHARES = frozenset({"mape"})
_BEST_IS_LARGEST = frozenset({"r2"})

Verdict = Literal["agrees", "differs", "flat within noise", "not told apart"]


@dataclass(frozen=True)
class Claim(ABC):
    """What a paper found."""

    point: float
    """The point that the paper names, as marked in figures and tables."""

    @property
    @abstractmethod
    def mark(self) -> str:
        """What the paper says of that point."""

    @abstractmethod
    def verdict(self, study: Study) -> Verdict:
        """Whether our trials agree."""

    @abstractmethod
    def words(self, study: Study) -> str:
        """The verdict in words, with the figures that it rests on."""


@dataclass(frozen=True)
class Grid:
    """One sensitivity study of a paper: a setting, its points, and what the paper found."""

    name: str
    setting: str
    """What the points are values of, in words."""
    model: str
    points: tuple[float, ...]
    figures: tuple[str, ...]
    """By their names in `metrics.figures`; the first is where the optimum is sought."""
    claim: Claim
    source: str
    """The paper and its figure."""

    def point(self, value: float) -> str:
        """A point in words."""
        return f"{value:g}"

    def tick(self, value: float) -> str:
        """A point below its place on an axis."""
        return self.point(value)


@dataclass(frozen=True)
class Interval:
    """The mean over seeds, and how far the true mean may be from it."""

    mean: float
    width: float
    """Half of the interval; ∞ where one seed says nothing of chance."""


@dataclass(frozen=True)
class Noise:
    """What is left between the seeds of a point."""

    deviation: float
    """Its standard deviation."""
    freedom: int
    """Degrees of freedom; 0 where nothing is known."""

    @classmethod
    def of(cls, samples: Sequence[NDArray[np.float64]], matched: bool) -> Noise:
        """Of the points' values by seed. What seeds do to all points alike is taken out, if they are matched
        and there are several points."""
        rest = [sample - sample.mean() for sample in samples]
        freedom = sum(len(sample) - 1 for sample in samples)
        if matched and len(samples) > 1:
            common = np.mean(rest, axis=0)
            rest = [of - common for of in rest]
            freedom = (len(samples) - 1) * (len(samples[0]) - 1)
        squares = sum(float((of**2).sum()) for of in rest)
        return cls((squares / freedom) ** 0.5 if freedom else np.nan, freedom)


@dataclass(frozen=True)
class Study:
    """A grid that was run on one data set."""

    grid: Grid
    data: str
    """The data set, in words."""
    values: Mapping[float, Mapping[str, Sequence[float]]]
    """Point → figure → its value for each seed; MSE, MAE and RMSE in units of the training part's standard
    deviation, the mean over metrics. Without the points that are `missing`."""
    budget: str
    """How each trial was fitted, in words."""
    seconds: float
    """What the fits of all trials took together."""
    missing: Mapping[float, str]
    """Points that came to no end or that the data do not allow, and why."""
    matched: bool = True
    """Whether all points have the same seeds, in the same order."""

    def intervals(self, figure: str) -> dict[float, Interval]:
        """Point → mean and interval: Student's, with the variance that is left between seeds pooled over the
        points, as in the analysis of variance that decides. They are for comparing points with each other."""
        found = self.noise(figure)
        scale = (
            stats.t.ppf((1 + CONFIDENCE) / 2, found.freedom) * found.deviation if found.freedom else np.inf
        )
        return {
            point: Interval(float(np.mean(of[figure])), float(scale / len(of[figure]) ** 0.5))
            for point, of in self.values.items()
        }

    def noise(self, figure: str) -> Noise:
        """What chance makes of a point, by the seeds."""
        return Noise.of([np.asarray(of[figure]) for of in self.values.values()], self.matched)

    @property
    def first(self) -> str:
        """The figure that decides."""
        return self.grid.figures[0]

    @cached_property
    def best(self) -> float:
        """The point with the best mean; of equal ones the first."""
        sign = -1 if self.first in _BEST_IS_LARGEST else 1
        return min(self.values, key=lambda point: sign * float(np.mean(self.values[point][self.first])))

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the paper's claim holds here."""
        return self.grid.claim.verdict(self)

    @property
    def words(self) -> str:
        """The verdict in a sentence, with the figures that it rests on."""
        return f"{self.data}, {self.grid.setting}: {self.grid.claim.words(self)}"

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, for those who draw it anew; the grid by its name."""
        return {
            "grid": self.grid.name,
            "data": self.data,
            "model": self.grid.model,
            "values": {f"{point:g}": dict(found) for point, found in self.values.items()},
            "budget": self.budget,
            "missing": {f"{point:g}": why for point, why in self.missing.items()},
            "matched": self.matched,
            "best": f"{self.best:g}",
            "paper": f"{self.grid.claim.point:g}",
            "verdict": self.verdict,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, grid: Grid, saved: dict[str, Any]) -> Study:
        """What `to_json` gave of a study of this grid."""
        values, missing = (
            {float(point): of for point, of in saved[name].items()} for name in ("values", "missing")
        )
        told = (saved["data"], values, saved["budget"], saved["seconds"], missing, saved["matched"])
        return cls(grid, *told)


@dataclass(frozen=True)
class Optimum(Claim):
    """A paper's best point."""

    @property
    def mark(self) -> str:
        """Of the best point."""
        return "the paper’s best"

    def verdict(self, study: Study) -> Verdict:
        """Flat if an analysis of variance finds no point that differs; else whether the paper's optimum is
        ours, or cannot be told apart from it (Tukey's test, as the best of many points was chosen)."""
        samples = [np.asarray(found[study.first]) for found in study.values.values()]
        noise = study.noise(study.first)
        if len(samples) < 2 or not _differ(samples, noise):
            return "flat within noise"
        if study.best == self.point:
            return "agrees"
        theirs = study.values.get(self.point)
        if theirs is None:
            return "differs"
        ours = study.values[study.best][study.first]
        gap = abs(float(np.mean(ours)) - float(np.mean(theirs[study.first])))
        error = noise.deviation / min(len(ours), len(theirs[study.first])) ** 0.5
        p = stats.studentized_range.sf(gap / error, len(samples), noise.freedom) if error else 0.0
        return "differs" if p < 1 - CONFIDENCE else "not told apart"

    def words(self, study: Study) -> str:
        """Our best point and the paper's."""
        grid, title = study.grid, TITLES[study.first]
        found = study.intervals(study.first)
        shown = f"{grid.point(study.best)} ({title} {_figure(study.first, found[study.best].mean)})"
        paper = f"the paper’s is {grid.point(self.point)}"
        if self.point in found:
            paper += f" (here {_figure(study.first, found[self.point].mean)})"
        ends: dict[Verdict, str] = {
            "agrees": f"the best is {shown}, as in the paper: agrees.",
            "differs": f"the best is {shown}, {paper}: differs.",
            "not told apart": f"the best is {shown}, {paper}: the two are not told apart.",
            "flat within noise": "flat within noise: no point is surely better than another; the best mean "
            f"is at {shown}, {paper}.",
        }
        return ends[study.verdict]


@dataclass(frozen=True)
class StaysAbove(Claim):
    """A paper's claim that a figure stays above a floor up to the point, and falls beyond."""

    figure: str
    floor: float

    @property
    def mark(self) -> str:
        """Of the last point that the paper has above the floor."""
        return f"paper: above {self.floor:.2f} up to here"

    def verdict(self, study: Study) -> Verdict:
        """Agrees if the intervals of all points up to that one lie above the floor, and differs if any of
        them lies below."""
        found = [one for point, one in study.intervals(self.figure).items() if point <= self.point]
        if not found or any(one.mean + one.width < self.floor for one in found):
            return "differs" if found else "not told apart"
        return "agrees" if all(one.mean - one.width > self.floor for one in found) else "not told apart"

    def words(self, study: Study) -> str:
        """The figure at each point."""
        grid, title = study.grid, TITLES[self.figure]
        each = ", ".join(
            f"{_figure(self.figure, one.mean)} at {grid.point(point)}"
            for point, one in study.intervals(self.figure).items()
        )
        ends: dict[Verdict, str] = {
            "agrees": "agrees",
            "differs": "differs",
            "not told apart": "the seeds or the points that there are do not tell",
            "flat within noise": "",
        }
        return (
            f"{title} is {each}; the paper’s stays above {self.floor:.2f} up to {grid.point(self.point)} and "
            f"falls beyond: {ends[study.verdict]}."
        )


def _differ(samples: Sequence[NDArray[np.float64]], noise: Noise) -> bool:
    """Whether any point's mean surely differs from the others': the F test."""
    if not noise.freedom:
        return False
    means = np.array([sample.mean() for sample in samples])
    sizes = np.array([len(sample) for sample in samples])
    between = float((sizes * (means - np.average(means, weights=sizes)) ** 2).sum()) / (len(samples) - 1)
    if noise.deviation == 0:
        return between > 0
    p = stats.f.sf(between / noise.deviation**2, len(samples) - 1, noise.freedom)
    return bool(p < 1 - CONFIDENCE)


def render(studies: Sequence[Study], title: str, left_out: Mapping[str, str] | None = None) -> Pages:
    """The page of some studies; `left_out` has the setting of each that the data do not allow, and why."""
    found = [_how_to_read(), *(_section(study) for study in studies)]
    verdicts = [study.words for study in studies]
    verdicts += [f"{setting}: left out: {why}." for setting, why in (left_out or {}).items()]
    return document.pages(title, verdicts, found)


def _how_to_read() -> Section:
    return Section(
        "How to read this",
        (
            "Each study changes one setting and nothing else. All points are fitted with the same budget and "
            "tested on the same targets, the last part of the time. MSE, MAE and RMSE are in units of the "
            "training part’s standard deviation (MSE: of its square), the mean over metrics; the paper’s are "
            "of other data in other units: the shape of a curve and the place of its optimum compare, its "
            "height does not.",
            "All points have the same seeds, and what a seed does to all points alike is taken out. Bars and "
            "“±” are intervals of 95 % for comparing points, of what is then left, pooled over the points. "
            "“Flat within noise”: an analysis of variance finds no point that differs at 5 %. "
            "“Not told apart”: the best point and the paper’s do not differ by Tukey’s test at 5 %.",
            "Requests per second: the same trials, their targets sorted by how many requests all entities "
            "received together at the time that a target is of.",
        ),
    )


def _section(study: Study) -> Section:
    grid = study.grid
    columns = (grid.setting, *(TITLES[figure] for figure in grid.figures), "seeds")
    rows = []
    for point, found in study.values.items():
        cells = (_cell(figure, study.intervals(figure)[point]) for figure in grid.figures)
        mark = f" ({grid.claim.mark})" if point == grid.claim.point else ""
        rows.append((f"{grid.point(point)}{mark}", *cells, str(len(found[study.first]))))
    words = (
        study.words,
        f"Paper: {grid.source}.",
        f"{study.budget} The fits took {study.seconds:,.0f} s in all.",
        *(f"{grid.point(point)} is left out: {why}." for point, why in study.missing.items()),
    )
    best = rows[list(study.values).index(study.best)][0]
    table = Table(columns, rows, marked=frozenset({best}))
    pictures = tuple(picture(study, figure) for figure in grid.figures)
    return Section(f"{study.data}: {grid.setting}", words, (table,), pictures)


def _cell(figure: str, interval: Interval) -> str:
    if not np.isfinite(interval.width):
        return _figure(figure, interval.mean)
    return f"{_figure(figure, interval.mean)} ± {_figure(figure, interval.width)}"


def _figure(figure: str, value: float) -> str:
    return percent(value) if figure in _SHARES else number(value)


def picture(study: Study, name: str) -> Picture:
    """A figure at each point, evenly spaced as the papers draw them."""
    grid, share = study.grid, name in _SHARES
    title = TITLES[name] + (", %" if share else "")
    figure, (axes,) = plots.subplots(title)
    found = list(study.intervals(name).values())
    times, places = 100 if share else 1, range(len(found))
    mean, width = (times * np.array([getattr(one, part) for one in found]) for part in ("mean", "width"))
    bars = np.where(np.isfinite(width), width, 0)
    axes.errorbar(places, mean, bars, fmt="o-", color=plots.MODEL, capsize=2.5, label="mean over seeds, 95 %")
    claim = grid.claim
    if claim.point in study.values:
        at = list(study.values).index(claim.point)
        axes.axvline(at, color=plots.QUIET, linestyle="--", linewidth=1, label=claim.mark)
    axes.set_xticks(places, [grid.tick(point) for point in study.values])
    axes.set_xlabel(grid.setting)
    plots.legend(figure, axes)
    where = f"{study.data}: {TITLES[name]} by {grid.setting}"
    return Picture(where, plots.png(figure), f"{where}, with intervals and the paper’s best")
