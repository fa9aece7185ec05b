"""Partial products: what some raw rows contribute to the canonical tables, and how parts merge.

Whoever reads rows aggregates them as far as it can before it lets go of them (10 s → 5 min is 30 × fewer
rows), and writes the parts by date and bucket: the shuffle is those files and where in them a place is.
Merging is associative: parts of parts, or all at once, give the same sums.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Product:
    """One kind of partial rows."""

    merge: Callable[[pl.DataFrame], pl.DataFrame]
    """Rows of several parts → one part."""
    date: str | None
    """Column whose date partitions the parts; None where the table is kept whole."""
    key: str | None
    """Column whose hash picks the bucket; None where a day of the table is small and has only one."""


def _merge_bins(parts: pl.DataFrame) -> pl.DataFrame:
    sums = [c for c in parts.columns if c.endswith(("_sum", "_count")) or c == "samples"]
    maxima = [c for c in parts.columns if c.endswith("_max")]
    return parts.group_by("entity", "time").agg(pl.col(sums).sum(), pl.col(maxima).max())


def _merge_entities(parts: pl.DataFrame) -> pl.DataFrame:
    """Each description of an entity once, with the last second that gave it."""
    return parts.group_by(pl.exclude("seen")).agg(pl.col("seen").max())


def _merge_instances(parts: pl.DataFrame) -> pl.DataFrame:
    return parts.group_by("job_name", "task_name", "machine", "slice").agg(pl.col("instances").sum())


def _merge_spans(parts: pl.DataFrame) -> pl.DataFrame:
    """Each call once, at its earliest time, however often it was logged."""
    return parts.group_by("source", "target", "call").agg(pl.col("time").min())


def _merge_calls(parts: pl.DataFrame) -> pl.DataFrame:
    return parts.group_by("time", "source", "target").agg(pl.col("weight").sum())


def _distinct(parts: pl.DataFrame) -> pl.DataFrame:
    return parts.unique().sort(parts.columns)


PRODUCTS: dict[str, Product] = {
    "machine": Product(_merge_bins, "time", "entity"),
    "container": Product(_merge_bins, "time", "entity"),
    "entities": Product(_merge_entities, None, None),
    "hosted": Product(_distinct, "start", None),
    "tasks": Product(_distinct, "slice", "job_name"),
    "instances": Product(_merge_instances, "slice", "job_name"),
    "calls": Product(_merge_calls, "time", "source"),
    "spans": Product(_merge_spans, "time", "source"),
}
#: The products that are telemetry, by the kind of their entities.
TELEMETRY = ("machine", "container")


def partitions(product: str, frame: pl.DataFrame, buckets: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """A part → its rows in the order of their places, and where each place begins: one for each date and
    bucket, `2018-01-02/03`, or `all`."""
    spec = PRODUCTS[product]
    if spec.date is None:
        return frame, {"all": 0}
    bucket = pl.lit("00") if spec.key is None else _bucket(frame[spec.key], buckets)
    place = pl.format("{}/{}", pl.col(spec.date).dt.date(), bucket)
    ordered = frame.with_columns(_place=place).sort("_place", maintain_order=True)
    runs = ordered["_place"].rle().struct.unnest()
    starts = runs["len"].cum_sum() - runs["len"]
    return ordered.drop("_place"), dict(zip(runs["value"], starts, strict=True))


def _bucket(keys: pl.Series, buckets: int) -> pl.Series:
    """Two digits for each key, the same on every machine and version (which polars' own hash is not)."""
    if buckets == 1:
        return pl.Series(["00"]).new_from_index(0, len(keys))
    names = keys.unique()
    digits = [f"{zlib.crc32(name.encode()) % buckets:02d}" for name in names]
    return keys.replace_strict(names, digits, return_dtype=pl.String)


def telemetry(bins: pl.DataFrame, metrics: Mapping[str, float]) -> pl.DataFrame:
    """Merged bins → telemetry rows: means, maxima, samples, in the order of entity and time; missing is null.

    `metrics` says by what to divide each to reach our unit.
    """
    columns = []
    mean: pl.Expr
    maximum: pl.Expr
    for metric, divisor in metrics.items():
        if f"{metric}_count" in bins.columns:
            count = pl.col(f"{metric}_count")
            mean = pl.when(count > 0).then(pl.col(f"{metric}_sum") / (count * divisor))
            maximum = pl.col(f"{metric}_max").cast(pl.Float64) / divisor  # float32 quotients are inexact
        else:
            mean = maximum = pl.lit(None)
        columns += [mean.cast(pl.Float32).alias(metric), maximum.cast(pl.Float32).alias(f"{metric}_max")]
    return bins.select("entity", "time", *columns, pl.col("samples").cast(pl.UInt32)).sort("entity", "time")


def last_known(descriptions: pl.DataFrame) -> pl.DataFrame:
    """Merged descriptions → each entity once, with the last known value of every column."""
    columns = [column for column in descriptions.columns if column not in ("entity", "seen")]
    ordered = descriptions.sort("entity", "seen", *columns, nulls_last=False)
    return ordered.group_by("entity", maintain_order=True).agg(pl.col(columns).drop_nulls().last())
