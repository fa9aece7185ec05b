"""The reduce side of ingest for dependencies: one day's records → the edges between its machines, and between
its services, slice by slice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from fleetcast import schemas
from fleetcast.graphs import batch_jobs, colocation, correlation, dependencies, sparsify
from fleetcast.ingest.options import IngestOptions
from fleetcast.store import Store
from fleetcast.traces.parts import Parts, read_parts
from fleetcast.traces.products import PRODUCTS

#: What tells which of a container's rows is the last.
_ORDER = ("container", "start", "running", "machine", "service")


def place_containers(store: Store, folder: str, days: list[dict[str, Any]], before: str | None) -> list[str]:
    """Day after day, the rows that say where containers ran on it: `<folder>/date=….parquet`.

    These are the rows of the day (`days` has each `day` and, by bucket, its `parts`) and, of each container,
    the last one before it; `before` is the day whose file says that of the first. So no day needs more than
    its own rows and the day before. Returns a digest of what each file says.
    """
    held = None if before is None else _ended(_placed(store, folder, before))
    digests = []
    for item in days:
        frames = [rows for rows in (held, _of_day(store, "hosted", item["parts"])) if rows is not None]
        rows = pl.concat([frame.select(_ORDER) for frame in frames]).unique().sort(_ORDER)
        with store.write(f"{folder}/date={item['day']}.parquet") as file:
            rows.write_parquet(file, compression="zstd")
        digests.append(hashlib.blake2b(rows.write_csv().encode(), digest_size=8).hexdigest())
        held = _ended(rows)
    return digests


def _of_day(store: Store, product: str, buckets: Mapping[str, Parts]) -> pl.DataFrame | None:
    """The merged rows of a product that is merged within each of a day's buckets; None if there are none."""
    frames = [read_parts(store, product, parts) for _, parts in sorted(buckets.items())]
    return pl.concat([rows for rows in frames if rows is not None]) if frames else None


def _placed(store: Store, folder: str, day: str) -> pl.DataFrame:
    with store.fs.open(store.path(f"{folder}/date={day}.parquet"), "rb") as file:
        return pl.read_parquet(file)


def _ended(rows: pl.DataFrame) -> pl.DataFrame:
    """The last row of each container, if it runs."""
    return rows.group_by("container", maintain_order=True).last().filter("running")


def combine_dependencies(
    store: Store, options: IngestOptions, placements: str, item: dict[str, Any]
) -> dict[str, Any]:
    """Tasks and instances, placements of containers, or else telemetry → dependencies of `item["day"]`."""
    day = datetime.fromisoformat(item["day"]).replace(tzinfo=UTC)
    slices = [day + timedelta(seconds=at) for at in range(0, 86_400, options.slice)]
    found = [_batch(store, item, day)]
    if item["placed"]:
        found.append(_colocation(_placed(store, placements, item["day"]), slices, options))
    if item["telemetry"]:
        found.append(_correlation(store, item["telemetry"], slices, options))
    edges = sparsify.strongest(pl.concat(found), options.neighbours).sort("time", "kind", "target", "source")
    store.write_table(item["target"], edges.to_arrow().cast(schemas.DEPENDENCIES))
    return {"edges": dict(edges["kind"].value_counts().sort("kind").iter_rows())}


def combine_calls(store: Store, options: IngestOptions, item: dict[str, Any]) -> dict[str, Any]:
    """Calls, and logs of single ones, → dependencies between services of `item["day"]`."""
    counted = [_of_day(store, "calls", item["calls"]), *_spans(store, item["spans"], options.slice)]
    calls = pl.concat([rows for rows in counted if rows is not None], how="diagonal_relaxed")
    found = sparsify.strongest(dependencies.of_kind("call", calls.lazy()), options.neighbours)
    edges = found.sort("time", "kind", "target", "source")
    store.write_table(item["target"], edges.to_arrow().cast(schemas.DEPENDENCIES))
    return {"edges": {"call": len(edges)}}


def _spans(store: Store, buckets: Mapping[str, Parts], width: int) -> Iterator[pl.DataFrame]:
    """How many calls there were of each pair in each slice, bucket by bucket: a log is long."""
    slices = (pl.col("time").dt.epoch("s") // width * width * 1000).cast(pl.Datetime("ms", "UTC"))
    for _, parts in sorted(buckets.items()):
        spans = read_parts(store, "spans", parts)
        if spans is not None:
            yield spans.group_by(slices, "source", "target").agg(weight=pl.len().cast(pl.Float64))


def _near(store: Store, product: str, days: list[Parts]) -> pl.DataFrame | None:
    """The rows of one bucket of neighbouring days, merged; None if there are none."""
    frames = [rows for parts in days if (rows := read_parts(store, product, parts)) is not None]
    return PRODUCTS[product].merge(pl.concat(frames)) if frames else None


def _none() -> pl.DataFrame:
    return pl.DataFrame(schema=dependencies.SCHEMA)


def _batch(store: Store, item: dict[str, Any], day: datetime) -> pl.DataFrame:
    """Bucket by bucket: a job's records are all in one."""
    found = []
    for bucket in sorted({bucket for buckets in item["instances"].values() for bucket in buckets}):
        tasks, instances = (
            _near(store, product, [buckets.get(bucket, {}) for buckets in item[product].values()])
            for product in ("tasks", "instances")
        )
        if tasks is not None and instances is not None:
            edges, _ = batch_jobs.edges(tasks, instances, since=day)
            found.append(edges.filter(pl.col("time") < day + timedelta(days=1)))
    if not found:
        return _none()
    terms = pl.concat(found).lazy().drop("kind")
    return dependencies.of_kind("batch", terms)


def _colocation(hosted: pl.DataFrame, slices: list[datetime], options: IngestOptions) -> pl.DataFrame:
    """A container stays where it was last seen running until it is seen again."""
    begun = pl.max_horizontal("start", pl.lit(slices[0]))
    placements = (
        hosted.sort(_ORDER)
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
