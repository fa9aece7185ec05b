"""The plots of the ladder's page: a few rungs in each, so that they can be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.evaluation import metrics as m
from fleetcast.evaluation.ladder import IDENTITY, RIDGE, Family, GraphLift, Standing
from fleetcast.evaluation.page import Picture, lead_time
from fleetcast.schemas import describe

SCALED = "MAE ÷ standard deviation"
#: Inches; the legend below takes a third.
_HEIGHT = 3.4
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
_FAMILIES: dict[Family, tuple[str, str]] = {
    "naive": (plots.QUIET, "s"),
    "statistical": (plots.PALETTE[1], "D"),
    "sequence": (plots.PALETTE[4], "^"),
    "graph": (plots.PALETTE[0], "o"),
}
_MARKERS = ("o", "D", "^", "s", "v", "P")


def styles(standing: Standing) -> dict[str, dict[str, Any]]:
    """How each of the shown rungs is drawn, in every plot of its data set."""
    found: dict[str, dict[str, Any]] = {}
    colours = iter(zip(plots.PALETTE, _DASHES, strict=False))
    for name in standing.shown:
        if name == standing.naive:
            found[name] = {"color": plots.QUIET, "linestyle": "-", "linewidth": 2.2}
        elif name == RIDGE:
            found[name] = {"color": plots.OBSERVED, "linestyle": ":"}
        else:
            colour, dash = next(colours)
            found[name] = {"color": colour, "linestyle": dash}
    return found


def by_horizon(standing: Standing) -> Picture:
    """Error by lead time."""
    figure, (axes,) = plots.subplots(SCALED, height=_HEIGHT)
    ahead = lead_time(axes, standing.data.horizon, standing.data.step)
    _lines(figure, axes, ahead, standing, {name: standing.by_horizon(name) for name in standing.shown})
    return _picture(standing, "error by lead time", figure)


def by_time(standing: Standing) -> Picture:
    """Error by the target's time of day."""
    figure, (axes,) = plots.subplots(SCALED, height=_HEIGHT)
    series = {name: standing.by_time(name) for name in standing.shown}
    buckets = len(next(iter(series.values())))
    axes.set_xlabel("time of day of the target, UTC")
    axes.set_xlim(0, 24)
    axes.set_xticks(range(0, 25, 6))
    _lines(figure, axes, (np.arange(buckets) + 0.5) * 24 / buckets, standing, series)
    return _picture(standing, "error by time of day", figure)


def calibration(standing: Standing) -> Picture:
    """Observed against nominal share of targets at or below each quantile."""
    figure, (axes,) = plots.subplots("share of targets at or below the quantile", height=_HEIGHT)
    axes.plot([0, 1], [0, 1], color=plots.QUIET, linestyle="-", linewidth=0.8)
    levels = np.array(standing.rungs[standing.shown[0]].scores.levels)
    axes.set_xlabel("quantile level")
    axes.set_xlim(0, 1)
    _lines(figure, axes, levels, standing, {name: standing.calibration(name) for name in standing.shown})
    axes.set_ylim(0, 1)
    return _picture(standing, "calibration", figure)


def cost(standing: Standing) -> Picture | None:
    """Error against the time to fit, each rung by its rank; None if no rung has both.

    Names would lie on one another: the best rungs' errors are close.
    """
    figure, (axes,) = plots.subplots(SCALED, width=5.4, height=3.2)
    axes.set_xlabel("seconds to fit, one seed")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    drawn = set()
    for rank, place in enumerate(standing.places, start=1):
        rung = standing.rungs[place.name]
        if not rung.cost.fit_seconds:
            continue
        colour, marker = _FAMILIES[rung.family]
        label = None if rung.family in drawn else rung.family
        drawn.add(rung.family)
        axes.plot(rung.cost.fit_seconds, place.error, marker, color=colour, markersize=5, label=label)
        at = (rung.cost.fit_seconds, place.error)
        axes.annotate(str(rank), at, (3.5, 2.5), textcoords="offset points", size=7)
    if not drawn:
        return None
    if standing.naive:
        error = next(place.error for place in standing.places if place.name == standing.naive)
        axes.axhline(error, color=plots.QUIET, linewidth=1.2, linestyle="-", label=standing.naive)
    axes.margins(x=0.08, y=0.12)
    plots.legend(figure, axes, columns=3)
    return _picture(standing, "error against the time to fit", figure)


def provisioning(standing: Standing, f: int) -> Picture:
    """Idle capacity against shortfall of metric f, a point for each quantile level."""
    metric = standing.data.metrics[f]
    figure, (axes,) = plots.subplots(
        "shortfall: " + describe(metric, standing.data.normalised), height=_HEIGHT
    )
    axes.set_xlabel("idle, same unit")
    for name, style in styles(standing).items():
        one = standing.rungs[name].scores.pooled()
        axes.plot(m.idle(one)[0, f], m.shortfall(one)[0, f], marker="o", markersize=3, label=name, **style)
    # Forecasts differ by shares, over several orders of magnitude from the lowest level to the highest.
    axes.set_xscale("log")
    axes.set_yscale("log")
    plots.legend(figure, axes, columns=2)
    return _picture(standing, f"{metric}, idle against shortfall", figure)


def skills(standings: Sequence[Standing], order: Sequence[str]) -> Picture:
    """The skill of every rung on every data set, in the order given, best first."""
    figure, (axes,) = plots.subplots("skill, %", width=5.4, height=0.9 + 0.2 * len(order))
    for i, standing in enumerate(standings):
        at = {place.name: place.skill for place in standing.places if place.skill is not None}
        rows = [(y, 100 * at[name]) for y, name in enumerate(order) if name in at]
        if rows:
            y, skill = zip(*rows, strict=True)
            colour = plots.PALETTE[i % len(plots.PALETTE)]
            axes.plot(
                skill,
                y,
                _MARKERS[i % len(_MARKERS)],
                color=colour,
                markersize=5,
                label=standing.data.name,
                alpha=0.85,
            )
    axes.axvline(0, color=plots.QUIET, linewidth=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.4, -0.6)
    # One rung far off would press all others together.
    axes.set_xlim(left=max(axes.get_xlim()[0], -100))
    plots.legend(figure, axes, columns=2)
    return Picture("Skill on every data set", plots.png(figure), "Skill of every rung on every data set")


def lift(data: str, lifts: Sequence[GraphLift]) -> Picture | None:
    """Per model, the change of the error by each kind of graph against none, with its interval.

    None if nothing was held against the identity graph.
    """
    rows = {lift.model: gaps for lift in lifts if (gaps := lift.against(IDENTITY))}
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for gaps in rows.values() for kind in gaps))
    height = 1.1 + 0.2 * (1 + len(kinds)) * len(rows)
    figure, (axes,) = plots.subplots("error against the identity graph, %", height=height)
    for i, kind in enumerate(kinds):
        # One below the other, as intervals overlap.
        shift = (i + 1) / (len(kinds) + 1) - 0.5
        y = [row + shift for row, gaps in enumerate(rows.values()) if kind in gaps]
        shares = np.array([gaps[kind].relative for gaps in rows.values() if kind in gaps])
        middle, low, high = 100 * np.where(np.isfinite(shares), shares, np.nan).T
        axes.errorbar(
            middle,
            y,
            xerr=[middle - low, high - middle],
            fmt=_MARKERS[i],
            color=plots.PALETTE[i],
            markersize=5,
            linewidth=1.2,
            capsize=2.5,
            label=kind,
        )
    axes.axvline(0, color=plots.QUIET, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plots.legend(figure, axes, columns=3)
    return Picture(
        f"{data}: what the graph changes",
        plots.png(figure),
        f"{data}: error of each graph model with each kind of graph against the identity graph, "
        "and its interval of 95 %",
    )


def _lines(
    figure: Figure,
    axes: Axes,
    x: NDArray[np.float64],
    standing: Standing,
    series: Mapping[str, NDArray[np.float64]],
) -> None:
    marker = "." if len(x) <= 24 else ""
    # The better in front of the worse.
    for depth, (name, style) in enumerate(styles(standing).items()):
        axes.plot(x, series[name], label=name, marker=marker, zorder=3 - depth / 100, **style)
    plots.legend(figure, axes, columns=2)


def _picture(standing: Standing, title: str, figure: Figure) -> Picture:
    names = ", ".join(standing.shown)
    return Picture(
        f"{standing.data.name}: {title}", plots.png(figure), f"{standing.data.name}, {title} of {names}"
    )
