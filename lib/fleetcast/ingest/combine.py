"""The reduce side of ingest: all parts of one day → its telemetry, and of all days → the entities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from fleetcast import schemas
from fleetcast.ingest.products import PRODUCTS, last_known, telemetry
from fleetcast.store import Store


def read_parts(store: Store, product: str, parts: list[str]) -> pl.DataFrame | None:
    """The merged rows of some parts, or None if there are none. Parts come in the order of their names, so
    sums of floats are the same whichever task wrote its part first."""
    frames = []
    for part in sorted(parts):
        with store.fs.open(store.path(part), "rb") as file:
            frames.append(pl.read_parquet(file))
    return PRODUCTS[product].merge(pl.concat(frames)) if frames else None


def combine_telemetry(
    store: Store, kind: str, parts: list[str], target: str, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Parts of one day and bucket → one telemetry file."""
    bins = read_parts(store, kind, parts)
    assert bins is not None, "a target is only planned where there are parts"
    rows = telemetry(bins, metrics)
    store.write_table(target, rows.to_arrow().cast(schemas.telemetry(list(metrics))))
    return {
        "rows": len(rows),
        "first": int(rows["time"].min().timestamp()),  # type: ignore[union-attr]
        "last": int(rows["time"].max().timestamp()),  # type: ignore[union-attr]
        "entities": rows["entity"].n_unique(),
    }


def combine_entities(store: Store, parts: list[str], target: str) -> dict[str, Any]:
    """Parts → everything known of every entity, by kind and name; services are entities too."""
    descriptions = read_parts(store, "entities", parts)
    assert descriptions is not None, "a target is only planned where there are parts"
    merged = last_known(descriptions)
    services = (
        merged.drop_nulls("service")
        .group_by(entity="service")
        .agg(pl.lit("service").alias("kind"), pl.col("measured").any())
    )
    everything = pl.concat([merged, services], how="diagonal").sort("kind", "entity")
    everything = everything.with_columns(pl.col("measured").fill_null(False))
    store.write_table(target, everything.select(schemas.ENTITIES.names).to_arrow().cast(schemas.ENTITIES))
    return {"rows": len(everything)}
