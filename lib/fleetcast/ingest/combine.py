"""The reduce side of ingest: all parts of one day → its telemetry, and of all days → the entities."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa

from fleetcast import schemas
from fleetcast.ingest.products import PRODUCTS, telemetry
from fleetcast.store import Store


def read_parts(store: Store, product: str, parts: list[str]) -> pl.DataFrame | None:
    """The merged rows of some parts, or None if there are none. Parts come in the order of their names, so sums
    of floats are the same whichever task wrote its part first."""
    frames = []
    for part in sorted(parts):
        with store.fs.open(store.path(part), "rb") as file:
            frames.append(pl.read_parquet(file))
    return PRODUCTS[product].merge(pl.concat(frames)) if frames else None


def combine_telemetry(
    store: Store, kind: str, parts: list[str], target: str, metrics: list[str]
) -> dict[str, Any]:
    """Parts of one day and bucket → one telemetry file."""
    bins = read_parts(store, kind, parts)
    assert bins is not None, "a target is only planned where there are parts"
    rows = telemetry(bins, metrics)
    store.write_table(target, rows.to_arrow().cast(schemas.telemetry(metrics)))
    return {
        "rows": len(rows),
        "first": int(rows["time"].min().timestamp()),  # type: ignore[union-attr]
        "last": int(rows["time"].max().timestamp()),  # type: ignore[union-attr]
        "entities": rows["entity"].n_unique(),
    }


def combine_entities(store: Store, parts: list[str]) -> pa.Table:
    """Everything known of every entity, in the order of their names; also its services as entities."""
    merged = read_parts(store, "entities", parts)
    if merged is None:
        return schemas.ENTITIES.empty_table()
    services = (
        merged.drop_nulls("service")
        .group_by(entity="service")
        .agg(pl.lit("service").alias("kind"), pl.col("measured").any())
    )
    everything = pl.concat([merged.drop("seen"), services], how="diagonal").sort("kind", "entity")
    everything = everything.with_columns(pl.col("measured").fill_null(False))
    return everything.select(schemas.ENTITIES.names).to_arrow().cast(schemas.ENTITIES)
