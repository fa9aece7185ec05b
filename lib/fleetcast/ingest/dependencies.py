"""The reduce side of ingest for dependencies: one day's records → its machine edges, slice by slice."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from fleetcast import schemas
from fleetcast.graphs import batch_jobs, colocation, correlation, dependencies, sparsify
from fleetcast.ingest.options import IngestOptions
from fleetcast.store import Store
from fleetcast.traces.parts import read_parts


def combine_dependencies(store: Store, options: IngestOptions, item: dict[str, Any]) -> dict[str, Any]:
    """Tasks and instances, placements of containers, or else telemetry → dependencies of `item["day"]`."""
    day = datetime.fromisoformat(item["day"]).replace(tzinfo=UTC)
    slices = [day + timedelta(seconds=at) for at in range(0, 86_400, options.slice)]
    found = [_batch(store, item, day), _colocation(store, item["hosted"], slices, options)]
    if item["telemetry"]:
        found.append(_correlation(store, item["telemetry"], slices, options))
    edges = sparsify.strongest(pl.concat(found), options.neighbours).sort("time", "kind", "target", "source")
    store.write_table(item["target"], edges.to_arrow().cast(schemas.DEPENDENCIES))
    return {"edges": dict(edges["kind"].value_counts().sort("kind").iter_rows())}


def _none() -> pl.DataFrame:
    return pl.DataFrame(schema=dependencies.SCHEMA)


def _batch(store: Store, item: dict[str, Any], day: datetime) -> pl.DataFrame:
    """Bucket by bucket: a job's records are all in one."""
    buckets: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"tasks": [], "instances": []})
    for product in ("tasks", "instances"):
        for part in item[product]:
            buckets[part.split("/")[-2]][product].append(part)
    found = []
    for bucket in buckets.values():
        tasks = read_parts(store, "tasks", bucket["tasks"])
        instances = read_parts(store, "instances", bucket["instances"])
        if tasks is not None and instances is not None:
            edges, _ = batch_jobs.edges(tasks, instances, since=day)
            found.append(edges.filter(pl.col("time") < day + timedelta(days=1)))
    if not found:
        return _none()
    terms = pl.concat(found).lazy().drop("kind")
    return dependencies.of_kind("batch", terms)


def _colocation(
    store: Store, parts: list[str], slices: list[datetime], options: IngestOptions
) -> pl.DataFrame:
    """A container stays where it was last seen running until it is seen again."""
    hosted = read_parts(store, "hosted", parts)
    if hosted is None:
        return _none()
    begun = pl.max_horizontal("start", pl.lit(slices[0]))
    placements = (
        hosted.sort("container", "start", "running", "machine", "service")
        .with_columns(end=pl.col("start").shift(-1).over("container"))
        .filter(pl.col("running") & (pl.col("end").is_null() | (pl.col("end") > begun)))
    )
    return colocation.edges(placements, slices, options.slice)


def _correlation(
    store: Store, telemetry: list[str], slices: list[datetime], options: IngestOptions
) -> pl.DataFrame:
    """The edges of every slice of a day from the day before, which is all that was known then."""
    tables = [store.read_table(path, columns=["entity", "time", "cpu"]) for path in telemetry]
    rows = pl.concat([pl.from_arrow(table) for table in tables])  # type: ignore[type-var]
    rows = rows.with_columns(pl.col("entity").cast(pl.String))  # type: ignore[union-attr]
    wide = rows.sort("entity").pivot("entity", index="time", values="cpu").sort("time")
    grid = pl.datetime_range(
        slices[0] - timedelta(days=1),
        slices[0],
        timedelta(seconds=options.step),
        closed="left",
        time_unit="ms",
        eager=True,
    )
    dense = grid.alias("time").to_frame().join(wide, on="time", how="left")
    # Machines move together within minutes, and single bins are noisy: quarters of an hour show it, lag 0.
    quarters = dense.group_by_dynamic("time", every="15m").agg(pl.exclude("time").mean()).drop("time")
    if len(quarters) < 3:
        return _none()
    edges = correlation.edges(quarters.to_numpy(), quarters.columns, slices[0], options.neighbours, lag=0)
    every_slice = pl.DataFrame({"time": slices}, schema={"time": pl.Datetime("ms", "UTC")})
    return edges.drop("time").join(every_slice, how="cross").select(list(dependencies.SCHEMA))
