"""What if: published forecasts of a store and a capacity curve, replayed under another quantile, lead time or
traffic factor, against what telemetry says came.

Whole replicas are provisioned for the highest forecast of the lead time; what is missing and what stays idle
is counted step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import polars as pl
from pydantic import Field

from fleetcast import plots
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.schemas import adds_up
from fleetcast.store import MANIFEST, Store


class WhatIfOptions(Options):
    """The replay."""

    metric: str = "cpu"
    """Of the forecasts."""
    quantiles: tuple[str, ...] = Field(("q50", "q75", "q90", "q95", "q99"), min_length=1)
    leads: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 3), min_length=1)
    """Steps whose highest forecast is provisioned for, from the current one on."""
    factors: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 1.2), min_length=1)
    """What came is multiplied by this, while the forecast stays as it was published."""
    unit: float = Field(0.05, gt=0)
    """Load that one replica carries within its objective, in the metric's unit: a straight capacity curve."""
    cores: float = Field(1, gt=0)
    """CPU of a replica."""
    least: int = Field(1, ge=0)
    """Least replicas of an entity."""


@dataclass(frozen=True)
class Replay:
    """One row of `table` for each quantile, lead and factor."""

    table: pl.DataFrame

    def markdown(self) -> str:
        """The table."""
        head = "| " + " | ".join(self.table.columns) + " |"
        rows = [
            "| " + " | ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in row) + " |"
            for row in self.table.iter_rows()
        ]
        return "\n".join([head, "|" + " --- |" * len(self.table.columns), *rows])

    def pictures(self) -> dict[str, bytes]:
        """Minutes under-provisioned against idle core-hours, a line for each lead and factor."""
        figure, (axes,) = plots.subplots("Under-provisioned, minutes per entity and day", width=6, height=3.6)
        for (lead, factor), part in self.table.group_by("lead", "factor", maintain_order=True):
            axes.plot(
                part["idle_core_hours"],
                part["under_minutes"],
                marker="o",
                label=f"lead {lead}, traffic × {factor}",
            )
            for quantile, x, y in part.select("quantile", "idle_core_hours", "under_minutes").iter_rows():
                axes.annotate(quantile, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel("Idle core-hours per entity and day")
        plots.legend(figure, axes, 2)
        return {"what-if": plots.png(figure)}


def what_if(store: Store, options: WhatIfOptions) -> Replay:
    """Replays all published forecasts of which telemetry knows what came.

    Raises InputError where there is none, or where a quantile is unknown.
    """
    step = _step(store)
    joined = _with_truth(store, options, step)
    rows = [
        _row(joined, step, options, quantile, lead, factor)
        for lead in options.leads
        for factor in options.factors
        for quantile in options.quantiles
    ]
    return Replay(pl.DataFrame(rows))


def _step(store: Store) -> int:
    """The width of all forecasts' steps [s]. Raises InputError if there is no forecast, or they differ."""
    store.open_existing()
    steps = {store.read_json(name)["step"] for name in store.list("forecasts", MANIFEST)}
    if len(steps) != 1:
        found = "forecasts with steps of " + " and ".join(f"{one} s" for one in sorted(steps))
        raise InputError(
            f"{store.uri}: {found if steps else 'no forecast'}, expected published ones of one step"
        )
    return int(steps.pop())


def _with_truth(store: Store, options: WhatIfOptions, step: int) -> pl.DataFrame:
    """`entity`, `time`, `truth` and the quantiles; of forecasts that overlap, the latest issued counts. What
    came is the mean of the telemetry's bins in a forecast's step."""
    parts = []
    for number, name in enumerate(sorted(store.list("forecasts", ".parquet"))):
        rows = pl.DataFrame(pl.from_arrow(store.read_table(name)))
        unknown = set(options.quantiles) - set(rows.columns)
        if unknown:
            raise InputError(f"quantiles {sorted(unknown)}, expected some of {sorted(set(rows.columns))}")
        rows = rows.filter(pl.col("metric").cast(pl.String) == options.metric)
        parts.append(
            rows.select(pl.col("entity").cast(pl.String), "time", *options.quantiles).with_columns(
                issue=pl.lit(number)
            )
        )
    if not parts or not sum(len(part) for part in parts):
        raise InputError(f"{store.uri}: no forecast of {options.metric}, expected one to replay")
    forecasts = pl.concat(parts).sort("issue").unique(["entity", "time"], keep="last")
    first, last = forecasts["time"].min(), forecasts["time"].max()
    days = {f"{day:%Y-%m-%d}" for day in forecasts["time"].dt.date().unique()}
    known = []
    for name in store.list("telemetry", ".parquet"):
        if any(f"date={day}" in name for day in days):
            rows = pl.DataFrame(pl.from_arrow(store.read_table(name, ["entity", "time", options.metric])))
            known.append(
                rows.select(
                    pl.col("entity").cast(pl.String), "time", truth=pl.col(options.metric)
                ).drop_nulls()
            )
    joined = forecasts.clear()
    if known:
        bins = pl.concat(known).group_by("entity", pl.col("time").dt.truncate(f"{step}s"))
        truth = bins.agg(pl.mean("truth"), bins=pl.len())
        if _level(store) == "service":
            truth = _of_services(store, truth, options.metric)
        joined = forecasts.join(truth.select("entity", "time", "truth"), on=["entity", "time"])
    if not len(joined):
        raise InputError(f"{store.uri}: no telemetry from {first!s} to {last!s}, expected what came of them")
    return joined.sort("entity", "time")


def _level(store: Store) -> str | None:
    """Of what the forecasts are. Raises InputError if they differ."""
    levels = {store.read_json(name).get("level") for name in store.list("forecasts", MANIFEST)}
    if len(levels) != 1:
        raise InputError(f"{store.uri}: forecasts of levels {levels}, expected published ones of one level")
    found: str | None = levels.pop()
    return found


def _of_services(store: Store, truth: pl.DataFrame, metric: str) -> pl.DataFrame:
    """What containers did → what their services did, as windows have it: the mean of all bins, of rates the
    sum over containers."""
    entities: Any = pl.from_arrow(
        store.read_table("entities/entities.parquet", ["entity", "kind", "service"])
    )
    part_of = (
        entities.filter(pl.col("kind") == "container")
        .select(pl.col("entity", "service").cast(pl.String))
        .drop_nulls()
    )
    joined = truth.join(part_of, on="entity")
    told = pl.col("truth").cast(pl.Float64)
    of_all = told.sum() if adds_up(metric) else (told * pl.col("bins")).sum() / pl.col("bins").sum()
    return joined.group_by(entity="service", time="time").agg(truth=of_all)


def _row(
    joined: pl.DataFrame, step: int, options: WhatIfOptions, quantile: str, lead: int, factor: float
) -> dict[str, float | int | str]:
    def replicas(load: pl.Expr) -> pl.Expr:
        return (load / options.unit - 1e-9).ceil().clip(lower_bound=options.least)

    hours = step / 3600
    # The highest forecast of this step and the next ones, backwards from the last.
    ahead = pl.max_horizontal(*(pl.col(quantile).shift(-number).over("entity") for number in range(lead)))
    counted = joined.with_columns(
        have=replicas(ahead), need=replicas(pl.col("truth").cast(pl.Float64) * factor)
    ).select(
        days=pl.len() * hours / 24,
        under=(pl.col("have") < pl.col("need")).sum() * hours * 60,
        idle=(pl.col("have") - pl.col("need")).clip(lower_bound=0).sum() * hours * options.cores,
        missing=(pl.col("need") - pl.col("have")).clip(lower_bound=0).sum() * hours * options.cores,
    )
    days, under, idle, missing = counted.row(0)
    return {
        "quantile": quantile,
        "lead": lead,
        "factor": factor,
        "under_minutes": under / days,
        "idle_core_hours": idle / days,
        "missing_core_hours": missing / days,
    }
