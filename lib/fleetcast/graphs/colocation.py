"""Dependencies between machines that run containers of the same service.

Replicas of a service share its traffic: when the load of one moves, so does that of the others.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import polars as pl

from fleetcast.graphs import dependencies


def edges(
    placements: pl.DataFrame, slices: list[datetime], slice_seconds: int, neighbours: int = 16
) -> pl.DataFrame:
    """The co-location edges of the slices that start at `slices` (UTC) and last `slice_seconds`.

    `placements` holds `container`, `machine`, `service` (strings), `start` and `end` (UTC times; a null
    `end` is a container that still runs). A container counts in every slice in which it ran at some time.

    For a service with c_m containers on machine m, m' receives from each other machine m

        weight(m → m') = c_m / Σ c_j  over the machines j ≠ m' it receives from,

    the share of its fellow replicas that run there: each machine receives 1 per service that it shares,
    however many containers that service has. Weights are summed over services. A machine receives from at
    most `neighbours` machines of a service, the nearest on the ring of its machines in order of their names
    (one after, one before, two after, …), so a service on n machines gives n · `neighbours` pairs and never
    n².
    """
    parts = [_edges_of_slice(placements, start, slice_seconds, neighbours) for start in slices]
    return pl.concat(parts) if parts else pl.DataFrame(schema=dependencies.SCHEMA)


def _edges_of_slice(placements: pl.DataFrame, start: datetime, seconds: int, neighbours: int) -> pl.DataFrame:
    running = (pl.col("start") < start + timedelta(seconds=seconds)) & (
        pl.col("end").is_null() | (pl.col("end") > start)
    )
    members = (
        placements.drop_nulls(["container", "machine", "service", "start"])
        .filter(running)
        .group_by("service", "machine")
        .agg(count=pl.col("container").n_unique())
        .sort("service", "machine")
        .with_columns(rank=pl.int_range(pl.len()).over("service"), machines=pl.len().over("service"))
        .with_columns(pl.col("rank", "machines").cast(pl.Int64))
    )
    sources = members.select("service", "count", source_rank="rank", source="machine")
    pairs = (
        members.rename({"machine": "target"})
        .drop("count")
        .join(_ring_steps(neighbours), how="cross")
        .filter(pl.col("order") < pl.col("machines"))
        .with_columns(source_rank=(pl.col("rank") + pl.col("step")) % pl.col("machines"))
        .join(sources, on=["service", "source_rank"])
    )
    share = pl.col("count") / pl.col("count").sum().over("service", "target")
    terms = pairs.lazy().select("source", "target", time=pl.lit(start), weight=share)
    return dependencies.of_kind("colocation", terms)


def _ring_steps(neighbours: int) -> pl.DataFrame:
    """`order` 1, 2, 3, 4, … and `step` +1, −1, +2, −2, …: the first n − 1 reach all others on a ring of n."""
    order = pl.int_range(1, neighbours + 1, dtype=pl.Int64, eager=True).alias("order")
    half = (order + 1) // 2
    return pl.DataFrame({"order": order, "step": half * (2 * (order % 2) - 1)})
