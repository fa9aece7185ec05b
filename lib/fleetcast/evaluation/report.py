"""The nightly report: what was forecast, how good it is, what it cost, what was lost, as one HTML page.

`render` needs nothing but a `NightlyReport`; the page needs nothing but itself: style and plots are inside.
The same ladder table, through `text_table`, is what a job prints at its end. All times are UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from fleetcast import plots
from fleetcast.errors import InputError
from fleetcast.evaluation import dependencies
from fleetcast.evaluation import metrics as m
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.naive import duration, skill_rung
from fleetcast.evaluation.page import Picture, lead_time, number, percent, template
from fleetcast.schemas import describe, describe_total, has_total
from fleetcast.windows.graph import LastGraph

#: A smaller relative difference between two errors is called a tie: an independent rerun of a published model
#: differs from its paper by about as much.
TIE = 0.01
#: How many entities of each metric the tables of peaks name, and how many have a plot.
PEAKS_LISTED = 10
PEAKS_PLOTTED = 6

Ladder = Sequence[tuple[str, Scores]]


@dataclass(frozen=True)
class NightlyReport:
    """Everything the page shows. Times are UTC, values in original units (`schemas.METRICS`).

    Each frame may be empty but has its columns: `COLUMNS` lists them.
    """

    issued: datetime
    """When the forecast was issued: the end of the last observed bin."""
    store: str
    """The store's URI."""
    model: str
    """The model's name in the ladder."""
    entities: int
    """How many entities were forecast."""
    horizon: int
    """H, forecast steps."""
    step: int
    """Seconds of a step."""
    marks: Sequence[tuple[str, datetime, datetime]]
    """Holidays and events around the forecast: name, start and end."""
    metrics: tuple[str, ...]
    """F metrics, in the order of the last axis of the scores."""
    normalised: tuple[str, ...]
    """Those whose unit nobody knows."""
    ladder: Ladder
    """(rung, scores on the test part) of the model and every naive rung: same windows and mask."""
    mase_scale: np.ndarray
    """[F] mean absolute seasonal difference of the training part."""
    summary: Sequence[tuple[str, Any]]
    """(label, value) pairs: rows read, windows, …; numbers are formatted here."""
    stages: pl.DataFrame
    """One row per stage of the run: its name, `done` or `skipped`, wall seconds, peak memory in MB of its
    largest process, and a remark such as the rows it made."""
    rejected: pl.DataFrame
    """Rows that could not be used, counted by table and reason."""
    fallbacks: pl.DataFrame
    """Entities whose forecast is the naive one, counted by reason."""
    total_history: pl.DataFrame
    """The cluster's observed total before `issued`, about three horizons of it; null in gaps."""
    total_forecast: pl.DataFrame
    """The cluster's forecast total with its own quantiles (not the sum of the entities' quantiles)."""
    peaks: pl.DataFrame
    """Each entity's step with the highest expected load: its time, mean and 95 % quantile."""
    entity_history: pl.DataFrame
    """As `total_history`, of at least the entities with the highest peaks."""
    entity_forecast: pl.DataFrame
    """As `total_forecast`, of the same entities."""
    total_note: str = "Sum over all entities."
    """One sentence on how the total and its interval are made."""
    graph: LastGraph | None = None
    """Who depends on whom; None where there are no edges."""


_FAN = ("metric", "time", "mean", "q05", "q25", "q75", "q95")
COLUMNS: dict[str, tuple[str, ...]] = {
    "stages": ("stage", "status", "seconds", "peak_mb", "note"),
    "rejected": ("table", "reason", "rows"),
    "fallbacks": ("reason", "entities"),
    "total_history": ("metric", "time", "value"),
    "total_forecast": _FAN,
    "peaks": ("entity", "metric", "time", "mean", "q95"),
    "entity_history": ("entity", "metric", "time", "value"),
    "entity_forecast": ("entity", *_FAN),
}


def render(report: NightlyReport) -> str:
    """The whole page. Raises InputError if a frame lacks a column or the rungs do not match."""
    for name, columns in COLUMNS.items():
        missing = [column for column in columns if column not in getattr(report, name).columns]
        if missing:
            raise InputError(
                f"report: {name} has no column {', '.join(missing)}; expected {', '.join(columns)}"
            )
    table = ladder_table(report.ladder, report.metrics, report.mase_scale)
    scores = dict(report.ladder).get(report.model)
    return template("report.html.j2").render(
        report=report,
        horizon=duration(report.horizon * report.step),
        step=duration(report.step),
        verdict=verdict(table, report.model),
        ladder=table.partition_by("metric", as_dict=True, maintain_order=True),
        skill_against=skill_rung([name for name, _ in report.ladder]),
        peaks=_top_peaks(report),
        totals=_total_plots(report),
        entities=_entity_plots(report),
        by_horizon=[_horizon_plot(report, f) for f in range(len(report.metrics))] if report.ladder else [],
        calibration=_calibration(report, scores) if scores and scores.levels else None,
        dependencies=dependencies.section(report.graph),
    )


# -- words and figures ---------------------------------------------------------------------------------------


def ladder_table(ladder: Ladder, metrics: Sequence[str], mase_scale: np.ndarray) -> pl.DataFrame:
    """One row per metric and rung, pooled over the horizon; null where a figure is not defined.

    Columns: `metric`, `rung`, `n`, then `mae` and `rmse` in the metric's units, and as plain ratios `wape`,
    `r2`, `mase`, `scaled_mae` (MAE ÷ training std), `coverage_50`, `coverage_80`, `coverage_90`, and `skill`:
    1 − MAE ÷ MAE of `skill_rung`. Raises InputError if the rungs did not count the same targets.
    """
    figures = ["mae", "rmse", "wape", "r2", "mase", "scaled_mae", "coverage_50", "coverage_80", "coverage_90"]
    against = skill_rung([name for name, _ in ladder])
    rows: list[dict[str, Any]] = []
    of_rung = {name: m.figures(scores, mase_scale) for name, scores in ladder}
    for name, scores in ladder:
        if not np.array_equal(scores.n, ladder[0][1].n):
            raise InputError(f"ladder: {name} and {ladder[0][0]} did not count the same targets")
    for f, metric in enumerate(metrics):
        for name, scores in ladder:
            row = of_rung[name][f]
            base = of_rung[against][f]["mae"] if against else None
            skill = 1 - row["mae"] / base if base and row["mae"] is not None else None
            pooled = {"metric": metric, "rung": name, "n": int(scores.n[:, f].sum())}
            rows.append(pooled | {figure: row[figure] for figure in figures} | {"skill": skill})
    types = {"metric": pl.String, "rung": pl.String, "n": pl.Int64}
    return pl.DataFrame(rows, schema=types | dict.fromkeys([*figures, "skill"], pl.Float64))


def verdict(table: pl.DataFrame, model: str) -> str:
    """One sentence: the model's MAE against the best naive rung's.

    Metrics are brought together by their MAE ÷ training std, the mean over metrics.
    """
    means = table.group_by("rung").agg(pl.col("scaled_mae").mean()).drop_nulls()
    error = {row["rung"]: row["scaled_mae"] for row in means.iter_rows(named=True)}
    if model not in error or len(error) < 2:
        return f"There are no test errors to compare {model} with a naive forecast."
    best = min((name for name in error if name != model), key=lambda name: (error[name], name))
    own, bar = error[model], error[best]
    if own < (1 - TIE) * bar:
        words = f"is better than the best naive forecast, {best}, by {percent(1 - own / bar)}"
    elif own > (1 + TIE) * bar:
        errors = f"its error is {number(own)} against {number(bar)}"
        words = f"is no better than the best naive forecast, {best}: {errors}"
    else:
        words = f"is no better than the best naive forecast, {best}: they differ by less than {percent(TIE)}"
    how = "mean absolute error on the test part, all metrics in units of their standard deviation"
    return f"{model} {words} ({how})."


def text_table(rows: pl.DataFrame | Sequence[Mapping[str, Any]]) -> str:
    """Plain aligned columns for a terminal: a heading, a rule, one line per row; numbers to the right."""
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
    columns = []
    for series in frame:
        cells = [series.name, *(number(value) for value in series)]
        width = max(map(len, cells))
        cells = [cell.rjust(width) if series.dtype.is_numeric() else cell.ljust(width) for cell in cells]
        columns.append([cells[0], "─" * width, *cells[1:]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


# -- tables and plots of the page ----------------------------------------------------------------------------


def _top_peaks(report: NightlyReport) -> dict[str, pl.DataFrame]:
    """Metric → the entities with the highest expected peaks, highest first."""
    tops = {}
    for metric in report.metrics:
        ranked = report.peaks.filter(pl.col("metric") == metric).sort(
            ["mean", "entity"], descending=[True, False], nulls_last=True
        )
        if len(ranked):
            tops[metric] = ranked.head(PEAKS_LISTED)
    return tops


def _total_plots(report: NightlyReport) -> list[Picture]:
    pictures = []
    for metric in filter(has_total, report.metrics):
        chosen = pl.col("metric") == metric
        history, forecast = report.total_history.filter(chosen), report.total_forecast.filter(chosen)
        if len(forecast):
            quantity = describe_total(metric, report.normalised)
            pictures.append(_forecast_plot(report, metric, quantity, history, forecast))
    return pictures


def _entity_plots(report: NightlyReport) -> list[Picture]:
    """The highest peaks of the first metric that has any."""
    for metric, top in _top_peaks(report).items():
        pictures = []
        for entity in top["entity"].head(PEAKS_PLOTTED):
            chosen = (pl.col("metric") == metric) & (pl.col("entity") == entity)
            history, forecast = report.entity_history.filter(chosen), report.entity_forecast.filter(chosen)
            if len(forecast):
                pictures.append(
                    _forecast_plot(report, entity, describe(metric, report.normalised), history, forecast)
                )
        return pictures
    return []


def _forecast_plot(
    report: NightlyReport, title: str, quantity: str, history: pl.DataFrame, forecast: pl.DataFrame
) -> Picture:
    figure, (axes,) = plots.subplots(quantity)
    history, forecast = history.sort("time"), forecast.sort("time")
    plots.line(axes, history["time"].to_numpy(), history["value"].to_numpy(), "observed", plots.OBSERVED)
    bands = {label: (forecast[low].to_numpy(), forecast[high].to_numpy()) for label, low, high in _BANDS}
    plots.fan(axes, forecast["time"].to_numpy(), forecast["mean"].to_numpy(), bands)
    plots.shade(axes, report.marks)
    plots.legend(figure, axes)
    alt = f"{title}: {quantity}, observed and forecast with 50 % and 90 % intervals"
    return Picture(title, plots.png(figure), alt)


_BANDS = (("90 %", "q05", "q95"), ("50 %", "q25", "q75"))


def _horizon_plot(report: NightlyReport, f: int) -> Picture:
    metric = report.metrics[f]
    figure, (axes,) = plots.subplots("MAE: " + describe(metric, report.normalised))
    ahead = lead_time(axes, report.horizon, report.step)
    # The model in front of the rungs, in its own colour wherever it stands in the ladder.
    for name, scores in sorted(report.ladder, key=lambda rung: rung[0] != report.model):
        front = 3 if name == report.model else 2
        marker = "." if report.horizon <= 24 else ""
        axes.plot(ahead, m.mae(scores)[:, f], label=name, zorder=front, marker=marker)
    axes.set_ylim(bottom=0)
    plots.legend(figure, axes, columns=2)
    return Picture(metric, plots.png(figure), f"{metric}: mean absolute error by lead time, every rung")


@dataclass(frozen=True)
class Calibration:
    """How often the targets stayed at or below each quantile."""

    picture: Picture
    rows: list[tuple[float, list[float]]]
    """(nominal level, observed share of each metric)."""


def _calibration(report: NightlyReport, scores: Scores) -> Calibration:
    observed = m.calibration(scores.pooled())[0]  # [F, Q]
    figure, (axes,) = plots.subplots("share of targets at or below the quantile", height=3.6)
    axes.plot([0, 1], [0, 1], color=plots.QUIET, linestyle="-", linewidth=1, label="ideal")
    for metric, shares in zip(report.metrics, observed, strict=True):
        axes.plot(scores.levels, shares, marker="o", markersize=3.5, label=metric)
    axes.set_xlabel("quantile level")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    plots.legend(figure, axes, columns=3)
    alt = f"{report.model}: observed share of targets at or below each quantile against its level"
    rows = [(level, [float(share) for share in observed[:, q]]) for q, level in enumerate(scores.levels)]
    return Calibration(Picture("Quantiles", plots.png(figure), alt), rows)
