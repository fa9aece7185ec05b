"""The edge frame that every kind of dependency ends in."""

from __future__ import annotations

import polars as pl

#: `schemas.DEPENDENCIES` in memory: `time` is the start of the slice, load travels from source to target.
SCHEMA: dict[str, pl.DataType] = {
    "time": pl.Datetime("ms", "UTC"),
    "source": pl.String(),
    "target": pl.String(),
    "kind": pl.String(),
    "weight": pl.Float32(),
}

#: Weights are added as whole multiples of 2⁻³⁰, so a sum does not depend on the order of its terms.
_UNIT = float(2**30)


def total(terms: pl.LazyFrame, by: list[str]) -> pl.LazyFrame:
    """`by` → float32 sum of `weight`, sorted by `by`; the same whatever the order of rows and threads."""
    return (
        terms.with_columns((pl.col("weight").cast(pl.Float64) * _UNIT).round().cast(pl.Int64))
        .group_by(by)
        .agg((pl.col("weight").sum() / _UNIT).cast(pl.Float32))
        .sort(by)
    )


def of_kind(kind: str, terms: pl.LazyFrame) -> pl.DataFrame:
    """`time`, `source`, `target`, `weight`, several rows an edge → the edge frame of one kind.

    Edges from an entity to itself and edges without weight are left out.
    """
    kept = terms.filter((pl.col("source") != pl.col("target")) & (pl.col("weight") > 0))
    summed = total(kept, ["time", "source", "target"]).with_columns(kind=pl.lit(kind))
    # Streaming: the terms of a join are summed as they come and never lie in memory all at once.
    return summed.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()).collect(
        engine="streaming"
    )
