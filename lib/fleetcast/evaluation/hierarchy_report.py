"""The report of levels: each level's own forecast, the sum of the level below, and one forecast of both.

Errors are those of the test part, over the same entities and times; intervals are paired over origins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.evaluation.compare import Gap, block_length, resample
from fleetcast.evaluation.document import Pages, Section, Table, pages
from fleetcast.evaluation.metrics import ABSOLUTE, COUNT
from fleetcast.evaluation.page import Picture, moment, number
from fleetcast.schemas import describe

#: How a level can be forecast, as the report names it.
OWN, BELOW, RECONCILED = "own", "sum of the level below", "reconciled"
_STYLE = {OWN: "-", BELOW: "--", RECONCILED: "-."}


@dataclass(frozen=True)
class Series:
    """The published forecast of a level, as the mean over its entities."""

    start: datetime
    """When it begins."""
    step: int
    """[s]."""
    past: Sequence[float | None]
    """What was observed before."""
    forecasts: Mapping[str, Sequence[float | None]]
    """By how it was made."""


@dataclass(frozen=True)
class LevelResult:
    """One level and metric."""

    level: str
    metric: str
    normalised: bool
    entities: int
    """With forecasts of all kinds; those without children are left out."""
    of: int
    """Of so many."""
    apart: float | None
    """How far the published own forecast and the sum of the level below lie apart, as share of the forecast;
    None for the lowest level."""
    sums: Mapping[str, Mapping[int, NDArray[np.float64]]]
    """Way of forecasting → origin → [K, H, 1] the sums of `metrics.per_origin`."""
    series: Series


@dataclass(frozen=True)
class HierarchyReport:
    """The document, and its sentences."""

    pages: Pages
    verdicts: list[str]


def hierarchy_pages(issued: datetime, results: Sequence[LevelResult]) -> HierarchyReport:
    """Tables and plots of all levels and metrics."""
    verdicts = [_verdict(one) for one in results]
    columns = (
        "level, metric", "entities", OWN, BELOW, RECONCILED, "sum against own, %",
        "reconciled against own, %", "apart before, %",
    )  # fmt: skip
    table = Table(columns, [_row(one) for one in results])
    how = (
        "Mean absolute errors on the test part in units of the training part's standard deviation, over the "
        "same entities and times for each way. Negative gaps are better than the level's own forecast; in "
        "parentheses the 95 % interval, paired over origins: where it holds 0, it is a tie.",
        "The sum of the level below is the mean of a service's containers (the sum of rates), or that of "
        "a machine's containers by their share of its capacity, with a scale that is fitted, plus what the "
        "parent carried besides them in the look-back. Reconciled forecasts weigh both by their errors on "
        "the validation part (minimum trace), and agree: a service's is what its containers add up to.",
    )
    pictures = tuple(_picture(one) for one in results if one.level != "container" and one.entities)
    sections = [
        Section("Levels against the sum of the level below", how, (table,)),
        Section("The published forecast", ("Means over a level's entities.",), (), pictures),
    ]
    return HierarchyReport(pages(f"Levels, forecast of {moment(issued)}", verdicts, sections), verdicts)


def _gap(one: LevelResult, way: str) -> Gap | None:
    """A way against the level's own forecast; None where it does not exist, or nothing was counted."""
    if way not in one.sums or not _count(one):
        return None
    found = {name: [one.sums[name]] for name in (OWN, way)}
    # Origins are a horizon or more apart: neighbours alone may be alike.
    return resample(found, block_length(one.sums[OWN], 1, 86_400)).compare(way, OWN)


def _count(one: LevelResult) -> float:
    return float(sum(part[COUNT].sum() for part in one.sums[OWN].values()))


def _error(one: LevelResult, way: str) -> str:
    if way not in one.sums or not _count(one):
        return "–"
    return number(sum(part[ABSOLUTE].sum() for part in one.sums[way].values()) / _count(one))


def _relative(gap: Gap | None) -> str:
    if gap is None:
        return "–"
    middle, low, high = (100 * share for share in gap.relative)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def _row(one: LevelResult) -> tuple[str, ...]:
    return (
        f"{one.level}, {one.metric}",
        f"{one.entities} of {one.of}",
        *(_error(one, way) for way in (OWN, BELOW, RECONCILED)),
        *(_relative(_gap(one, way)) for way in (BELOW, RECONCILED)),
        "–" if one.apart is None else f"{100 * one.apart:.1f}",
    )


def _verdict(one: LevelResult) -> str:
    """One sentence of a level and metric."""
    gap = _gap(one, RECONCILED)
    if gap is None:
        return f"{one.level}, {one.metric}: nothing to compare, no entity has a level below that is forecast."
    words = {"better": "is better than", "worse": "is worse than", "tie": "ties with"}
    found = (
        f"{one.level}, {one.metric}: reconciled {words[gap.verdict]} its own forecast ({_relative(gap)} %)"
    )
    below = _gap(one, BELOW)
    if below is None:
        return f"{found}."
    return f"{found}; the sum of the level below {words[below.verdict]} it ({_relative(below)} %)."


def _picture(one: LevelResult) -> Picture:
    quantity = describe(one.metric, (one.metric,) if one.normalised else ())
    figure, (axes,) = plots.subplots(f"{quantity}, mean of {one.level}s", width=5.2)
    series = one.series

    def times(first: int, count: int) -> NDArray[np.datetime64]:
        seconds = [series.start + timedelta(seconds=series.step * (first + n)) for n in range(count)]
        return np.array([at.replace(tzinfo=None) for at in seconds], "datetime64[s]")

    past = np.array([np.nan if value is None else value for value in series.past])
    plots.line(axes, times(-len(past), len(past)), past, "observed", plots.OBSERVED)
    for place, (way, style) in enumerate(_STYLE.items()):
        values = np.array([np.nan if v is None else v for v in series.forecasts[way]])
        axes.plot(times(0, len(values)), values, label=way, color=plots.PALETTE[place], linestyle=style)
    plots.legend(figure, axes, 4)
    alt = f"{one.level}, {one.metric}: observed, its own forecast, the sum of the level below, reconciled"
    return Picture(f"{one.level}, {one.metric}", plots.png(figure), alt)
