"""What sources share: samples of telemetry → partial bins, and descriptions of entities."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from fleetcast.traces.raw import Binning

#: No count is larger, and its float32 is still finite.
LARGEST = 1e30
#: A stamp later than this is a broken clock, not a long trace [s].
LATEST = 10 * 366 * 86_400


def missing(column: str) -> dict[str, pl.Expr]:
    """The reason for rows without a value there."""
    return {f"{column} is empty": pl.col(column).is_null()}


def clock(column: str, second: int = 1) -> dict[str, pl.Expr]:
    """The reasons for rows whose stamp, of so many units a second from the trace's start, cannot be."""
    time = pl.col(column)
    return missing(column) | {f"{column} is outside 0 to 10 years": ~time.is_between(0, LATEST * second)}


def negative(*columns: str) -> dict[str, pl.Expr]:
    """Present values that cannot be; nan and inf are among them."""
    return {column: ~pl.col(column).is_between(0, LARGEST) for column in columns}


def unix(seconds: pl.Expr, binning: Binning, width: int) -> pl.Expr:
    """Start of the bin or slice of `width` seconds in which a second of the trace lies, as UTC."""
    return ((seconds // width * width + binning.start) * 1000).cast(pl.Datetime("ms", "UTC"))


def bins(
    frame: pl.DataFrame, entity: str, second: pl.Expr, usage: Mapping[str, str], binning: Binning
) -> pl.DataFrame:
    """Samples → per entity and bin, and per metric, sum, count and maximum of its values; and `samples`.

    `usage` says which column holds a metric. In raw units: percentages are short numbers, whose float64 sums
    are exact whatever the order. Columns that are full, or empty as some are for days, need no counting,
    which is a third of the work.
    """
    nulls = {metric: frame[column].null_count() for metric, column in usage.items()}
    empty = [metric for metric in usage if nulls[metric] == len(frame)]
    full = [metric for metric in usage if not nulls[metric]]
    some = [metric for metric in usage if metric not in empty]
    found = (
        frame.lazy()
        .select(
            pl.col(entity).alias("entity"),
            (second // binning.step).cast(pl.Int32).alias("bin"),
            *(pl.col(usage[metric]).alias(metric) for metric in some),
        )
        .group_by("entity", "bin")
        .agg(
            pl.col(some).cast(pl.Float64).sum().name.suffix("_sum"),
            pl.col([metric for metric in some if nulls[metric]]).count().name.suffix("_count"),
            pl.col(some).max().cast(pl.Float32).name.suffix("_max"),
            pl.len().alias("samples"),
        )
        .collect()
    )
    nothing = {"_sum": (0, pl.Float64), "_count": (0, pl.UInt32), "_max": (None, pl.Float32)}
    seconds = pl.col("bin").cast(pl.Int64) * binning.step + binning.start
    every = found.with_columns(
        *(pl.col("samples").alias(f"{metric}_count") for metric in full),
        *(
            pl.lit(value, dtype).alias(metric + part)
            for metric in empty
            for part, (value, dtype) in nothing.items()
        ),
        time=(seconds * 1000).cast(pl.Datetime("ms", "UTC")),
    )
    parts = [metric + part for metric in usage for part in nothing]
    return every.select("entity", "time", *parts, "samples")


def entities(frame: pl.DataFrame, seen: pl.Expr, **columns: pl.Expr) -> pl.DataFrame:
    """Entities as seen in a block: `seen` is the last second that says so; unnamed columns are null."""
    empty = {
        "kind": pl.String,
        "parent": pl.String,
        "service": pl.String,
        "cpu_capacity": pl.Float32,
        "memory_capacity": pl.Float32,
        "measured": pl.Boolean,
    }
    filled = {name: columns.get(name, pl.lit(None)).cast(dtype) for name, dtype in empty.items()}
    return frame.select(columns["entity"].alias("entity"), **filled, seen=seen.cast(pl.Int64))
