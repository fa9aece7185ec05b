"""Telemetry and dependencies → shards, in two passes over files.

First each telemetry file is taken apart by entity group, brought to the dataset's step, and written with one
row group per entity group; the same for each file of dependencies. Then each shard reads its row groups of
the days it touches. No pass holds more than one file or one shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast import schemas
from fleetcast.config import Options
from fleetcast.store import Store
from fleetcast.windows.edges import combine
from fleetcast.windows.manifest import Manifest, Scaler, Shard

#: A slice divides a day [s].
_LONGEST_SLICE = 86_400


class Grid(Options):
    """The axes of a dataset, before its shards are built."""

    metrics: tuple[str, ...]
    start: int
    step: int
    steps: int
    lag: int | None
    """The first seasonal lag [steps], for the unit of MASE."""
    train: int
    """Steps of the training part."""
    kinds: tuple[str, ...]
    """Kinds of dependencies that become edges."""

    @classmethod
    def of(cls, draft: Manifest, kinds: tuple[str, ...]) -> Grid:
        """The axes that a manifest describes."""
        return cls(
            metrics=draft.metrics,
            start=draft.start,
            step=draft.step,
            steps=draft.steps,
            lag=draft.lags[0] if draft.lags else None,
            train=draft.boundaries[0],
            kinds=kinds,
        )


@dataclass(frozen=True)
class Places:
    """Where the entities of the telemetry lie in the groups and on their borders."""

    own: pl.DataFrame
    """`entity` of the telemetry → `group` and `index` of the unit that is forecast; several entities may
    share one, as containers of a service do."""
    units: pl.DataFrame
    """`entity`, the name of a unit, of which dependencies are → its `group` and `index`."""
    border: pl.DataFrame
    """`home` and `place`, a unit's own group and index → each `group` that it borders, and its `index`
    there."""

    @classmethod
    def of(cls, draft: Manifest, units: pl.DataFrame) -> Places:
        """Of telemetry whose `entity` is part of a `unit`, which is one of the manifest's names."""
        own = _axis(draft.groups, [0] * len(draft.groups))
        border = _axis(draft.borders, [len(group) for group in draft.groups])
        home = own.rename({"group": "home", "index": "place"})
        return cls(
            units.join(own, on="unit").select("entity", "group", "index"),
            own.rename({"unit": "entity"}),
            border.join(home, on="unit").select("home", "place", "group", "index"),
        )


def _axis(groups: tuple[tuple[str, ...], ...], first: list[int]) -> pl.DataFrame:
    """`unit`, `group` and `index` of all names; those of a group count from its `first`."""
    sizes = [len(group) for group in groups]
    index = [start + np.arange(size) for start, size in zip(first, sizes, strict=True)]
    return pl.DataFrame(
        {
            "unit": [name for group in groups for name in group],
            "group": np.repeat(np.arange(len(groups)), sizes),
            "index": np.concatenate([np.zeros(0, np.int64), *index]),
        },
        schema={"unit": pl.String, "group": pl.Int32, "index": pl.Int32},
    )


def _is_maximum(metric: str) -> bool:
    return metric.endswith("_max")


def _parts(metric: str) -> list[pl.Expr]:
    """What is kept of a metric's values: sum and count, or the maximum alone."""
    if _is_maximum(metric) and not schemas.adds_up(metric):
        return [pl.col(metric).max()]
    return [pl.col(metric).cast(pl.Float64).sum(), pl.col(metric).count().alias(f"{metric}#")]


def split_telemetry(store: Store, source: str, target: str, places: Places, grid: Grid) -> dict[str, Any]:
    """One telemetry file → rows of (`step`, `index`, sums, counts, maxima), one batch per entity group.

    Rows of an entity go to its own group and to all that it borders. Returns which group lies in which batch.
    """
    table: Any = pl.from_arrow(store.read_table(source, columns=["entity", "time", *grid.metrics]))
    step = (pl.col("time").dt.epoch("s") - grid.start) // grid.step
    rows = (
        table.lazy()
        .with_columns(pl.col("entity").cast(pl.String), step=step.cast(pl.Int32))
        .filter(pl.col("step").is_between(0, grid.steps - 1))
        .join(places.own.lazy(), on="entity")
    )
    if additive := [m for m in grid.metrics if schemas.adds_up(m)]:
        # What adds up over entities is their mean over the bins of a step first.
        rows = rows.with_columns(
            pl.when(pl.col(m).is_not_null())
            .then(
                (pl.col(m).max() if _is_maximum(m) else pl.col(m).cast(pl.Float64).mean()) / pl.col(m).count()
            )
            .over("entity", "step")
            for m in additive
        )
    parts = [part for m in grid.metrics for part in _parts(m)]
    rows = rows.group_by("group", "step", "index").agg(parts).collect()
    bordering = rows.rename({"group": "home", "index": "place"}).join(places.border, on=["home", "place"])
    both = pl.concat([rows, bordering.select(rows.columns)]).sort("group", "step", "index")
    return {"groups": _write_by_group(store, target, both)}


def split_dependencies(store: Store, source: str, target: str, places: Places, grid: Grid) -> dict[str, Any]:
    """One file of dependencies → its edges in entity groups, kinds combined, one batch per group.

    A group has the edges with at least one end among its own entities, whose other end is its own or on its
    border. Those between two of the border say little: most of what flows into a border entity comes from
    where the group does not see.
    """
    table: Any = pl.from_arrow(store.read_table(source))
    edges = (
        combine(table.with_columns(pl.col("source", "target").cast(pl.String)), grid.kinds)
        .join(places.units.select(source="entity", source_group="group", **{"from": "index"}), on="source")
        .join(places.units.select(target="entity", target_group="group", to="index"), on="target")
    )
    ends: dict[str, Any] = {"source": "from", "target": "to"}
    columns = ("group", "time", "weight", "source", "target")
    same = pl.col("source_group") == pl.col("target_group")
    inside = edges.filter(same).select("time", "weight", group="source_group", **ends)
    across = edges.filter(~same)
    at = ["home", "place", "group"]
    into = across.join(places.border, left_on=["source_group", "from", "target_group"], right_on=at)
    out = across.join(places.border, left_on=["target_group", "to", "source_group"], right_on=at)
    into = into.select("time", "weight", group="target_group", **ends | {"source": "index"})
    out = out.select("time", "weight", group="source_group", **ends | {"target": "index"})
    found = pl.concat([part.select(columns) for part in (inside, into, out)])
    return {"groups": _write_by_group(store, target, found.sort("group", "time", "target", "source"))}


def _write_by_group(store: Store, target: str, rows: pl.DataFrame) -> list[int]:
    """Writes rows sorted by `group`, without that column; returns the groups in order of the batches."""
    groups, first = np.unique(rows["group"].to_numpy(), return_index=True)
    store.write_row_groups(target, rows.drop("group").to_arrow(), first.tolist())
    return [int(group) for group in groups]


@dataclass(frozen=True)
class RowGroup:
    """Where a shard finds rows of its group."""

    path: str
    number: int


def read_row_groups(store: Store, parts: list[RowGroup]) -> pl.DataFrame | None:
    """The rows of all parts, or None if there are no parts."""
    if not parts:
        return None
    frame: Any = pl.from_arrow(store.read_row_groups([(part.path, part.number) for part in parts]))
    return frame


def build_shard(
    store: Store,
    grid: Grid,
    shard: Shard,
    entities: tuple[str, ...],
    border: tuple[str, ...],
    telemetry: list[RowGroup],
    edges: list[RowGroup],
    targets: tuple[str, str],
) -> dict[str, Any]:
    """Writes the values and edges of a group's own entities and its border to `targets`; returns what the
    scaler needs to know of its own."""
    members = entities + border
    dense = _dense(grid, shard, len(members), read_row_groups(store, telemetry))
    store.write_table(targets[0], _long(grid, shard, members, dense))
    found = read_row_groups(store, edges)
    store.write_table(targets[1], _shard_edges(grid, shard, found))
    return _statistics(grid, shard, dense[:, : len(entities)])


def _dense(grid: Grid, shard: Shard, entities: int, rows: pl.DataFrame | None) -> NDArray[np.float32]:
    """[T, N, F] means and maxima, NaN where there was no sample or an infinite one."""
    dense = np.full((shard.last - shard.first, entities, len(grid.metrics)), np.nan, np.float32)
    if rows is None:
        return dense
    rows = rows.filter(pl.col("step").is_between(shard.first, shard.last - 1))
    maxima = [m for m in grid.metrics if _is_maximum(m) and not schemas.adds_up(m)]
    sums = [c for c in rows.columns if c not in ("step", "index", *maxima)]
    # A service's containers may lie in several files.
    merged = rows.group_by("step", "index", maintain_order=True).agg(pl.col(sums).sum(), pl.col(maxima).max())
    at = (merged["step"].to_numpy() - shard.first, merged["index"].to_numpy())
    for f, metric in enumerate(grid.metrics):
        value = pl.col(metric)
        if metric not in maxima:
            count = pl.col(f"{metric}#")
            value = pl.when(count > 0).then(value if schemas.adds_up(metric) else value / count)
        column = merged.select(value.cast(pl.Float32).fill_null(float("nan")))[metric]
        dense[*at, f] = column.to_numpy()
    dense[np.isinf(dense)] = np.nan
    return dense


def _long(grid: Grid, shard: Shard, entities: tuple[str, ...], dense: NDArray[np.float32]) -> pa.Table:
    """A row for each step and entity, in that order, so the columns reshape to [T, N]."""
    steps, n, _ = dense.shape
    times = (grid.start + grid.step * np.arange(shard.first, shard.last, dtype=np.int64)) * 1000
    columns = {
        "time": pa.array(np.repeat(times, n)).cast(schemas.TIME),
        "entity": pa.DictionaryArray.from_arrays(
            np.tile(np.arange(n, dtype=np.int32), steps), list(entities)
        ),
    }
    for f, metric in enumerate(grid.metrics):
        columns[metric] = pa.array(np.ascontiguousarray(dense[:, :, f]).reshape(-1))
    return pa.table(columns)


def _shard_edges(grid: Grid, shard: Shard, found: pl.DataFrame | None) -> pa.Table:
    """`time` of the slice, `source` and `target` as positions among the group's members, `weight`."""
    empty = pl.Schema(
        {"time": pl.Datetime("ms", "UTC"), "source": pl.Int32(), "target": pl.Int32(), "weight": pl.Float32()}
    )
    edges = pl.DataFrame(schema=empty) if found is None else found
    seconds = pl.col("time").dt.epoch("s")
    low, high = (grid.start + grid.step * at for at in (shard.first, shard.last))
    # The last slice that is complete at a step starts less than two slices before it.
    return (
        edges.select(pl.col(name).cast(dtype) for name, dtype in empty.items())
        .filter(seconds.is_between(low - 2 * _LONGEST_SLICE, high))
        .to_arrow()
    )


def _statistics(grid: Grid, shard: Shard, dense: NDArray[np.float32]) -> dict[str, Any]:
    """Sums [N, F] over the shard's own steps, which partition the dataset: of the training part, of all."""
    own = slice(shard.start - shard.first, min(shard.stop, grid.steps) - shard.first)
    values = dense[own].astype(np.float64)
    train = values[: max(0, grid.train - shard.start)]
    seen = np.isfinite(train)
    count, total = seen.sum(0), np.where(seen, train, 0).sum(0)
    deviation = np.where(seen, train - total / np.maximum(count, 1), 0)
    statistics = {
        "count": count,
        "sum": total,
        "squares": (deviation**2).sum(0),
        "observed": np.isfinite(values).sum(0),
        "cells": np.full(values.shape[1:], len(values)),
        "seasonal_sum": np.zeros(values.shape[1:]),
        "seasonal_count": np.zeros(values.shape[1:]),
    }
    if grid.lag is not None and len(train):
        at = np.arange(shard.start, shard.start + len(train)) - shard.first
        at = at[at >= grid.lag]
        change = np.abs(dense[at] - dense[at - grid.lag]).astype(np.float64)
        statistics["seasonal_sum"] = np.nansum(change, 0)
        statistics["seasonal_count"] = np.isfinite(change).sum(0)
    return {name: np.asarray(value, np.float64).tolist() for name, value in statistics.items()}


@dataclass(frozen=True)
class Summary:
    """What the statistics of all shards say together."""

    scaler: Scaler
    seasonal_error: tuple[float, ...]
    observed: tuple[float, ...]
    unseen: tuple[int, ...]
    """Positions of metrics without a single value in the training part."""


def summarise(
    statistics: list[dict[str, list[list[float]]]], groups: list[int], by_entity: bool = False
) -> Summary:
    """Sums over shards, each of one of the `groups` → scaler, unit of MASE, share of observed values.

    A constant metric has std 1; an entity whose metric is constant, or was never observed, has the metric's.
    """
    entities = {group: len(s["count"]) for group, s in zip(groups, statistics, strict=True)}
    ordered = sorted(entities)
    stop = dict(zip(ordered, np.cumsum([entities[group] for group in ordered]).tolist(), strict=True))
    place = [slice(stop[g] - entities[g], stop[g]) for g in groups]
    each: dict[str, NDArray[np.float64]] = {}
    for name in statistics[0]:
        each[name] = np.zeros((sum(entities.values()), len(statistics[0][name][0])))
        for at, s in zip(place, statistics, strict=True):
            each[name][at] += s[name]
    mean = each["sum"] / np.maximum(each["count"], 1)
    # Squares are about the means of their shards: those of large values would drown the variance.
    squares = each["squares"]
    for at, s in zip(place, statistics, strict=True):
        count = np.asarray(s["count"])
        squares[at] += count * (np.asarray(s["sum"]) / np.maximum(count, 1) - mean[at]) ** 2

    total = {name: values.sum(0) for name, values in each.items()}
    count = np.maximum(total["count"], 1)
    pooled_mean = total["sum"] / count
    between = (each["count"] * (mean - pooled_mean) ** 2).sum(0)
    pooled_std = _not_constant(np.sqrt((squares.sum(0) + between) / count), pooled_mean, np.ones(1))
    of_entity = {}
    if by_entity:
        seen = each["count"] > 0
        std = _not_constant(np.sqrt(squares / np.maximum(each["count"], 1)), mean, pooled_std)
        of_entity = {
            "entity_mean": tuple(map(tuple, np.where(seen, mean, pooled_mean).tolist())),
            "entity_std": tuple(map(tuple, np.where(seen, std, pooled_std).tolist())),
        }
    scaler = Scaler(mean=tuple(pooled_mean), std=tuple(pooled_std), **of_entity)
    seasonal = total["seasonal_sum"] / np.maximum(total["seasonal_count"], 1)
    return Summary(
        scaler,
        tuple(np.where(total["seasonal_count"] > 0, seasonal, 0)),
        tuple(total["observed"] / np.maximum(total["cells"], 1)),
        tuple(int(i) for i in np.flatnonzero(total["count"] == 0)),
    )


def _not_constant(
    std: NDArray[np.float64], mean: NDArray[np.float64], otherwise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`std`, or `otherwise` where it is less than float32 can tell from a constant."""
    return np.where(std > 1e-6 * np.abs(mean), std, otherwise)
