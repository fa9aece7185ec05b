"""Parts in the store: partial products as they are written, and put together to the canonical tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import polars as pl

from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.store import Store
from fleetcast.traces.products import PRODUCTS, last_known, partitions, telemetry

#: Partial rows that a writer holds before it merges and writes them.
FLUSH_ROWS = 400_000
#: Parts that are read before they are merged.
_AT_ONCE = 64

#: Where the partial rows of a product and place are: file → the number of its row group there.
Parts = Mapping[str, int]


class PartWriter:
    """Collects partial rows of one input, and writes them merged whenever there are too many to hold."""

    def __init__(
        self,
        store: Store,
        folders: tuple[str, str],
        source: tuple[str, str, str],
        buckets: int = 1,
        flush_rows: int = FLUSH_ROWS,
    ) -> None:
        """`folders` are those of parts and of rejected rows; `source` is the table, the file, and what is
        unique about the input: the prefix of the names of all that is written."""
        self.store = store
        self.parts, self.rejected = folders
        self.table, self.file, self.id = source
        self.buckets = buckets
        self.flush_rows = flush_rows
        self.pending: dict[str, list[pl.DataFrame]] = {}
        self.held = 0
        self.places: dict[str, list[str]] = {}
        """Of each file of parts, the place of each of its row groups: `machine/2018-01-02/03`."""
        self.rows: Counter[str] = Counter()
        """Partial rows of each place."""
        self._written: Counter[str] = Counter()

    def add(self, product: str, frame: pl.DataFrame) -> None:
        """Takes partial rows of a product."""
        self.pending.setdefault(product, []).append(frame)
        self.held += len(frame)
        if self.held >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Writes everything held."""
        for product, frames in self.pending.items():
            merged = PRODUCTS[product].merge(pl.concat(frames))
            rows, starts = partitions(product, merged, self.buckets)
            name = self._name(f"{self.parts}/{product}", "arrow")
            self.store.write_row_groups(name, rows.to_arrow(), list(starts.values()))
            self.places[name] = [f"{product}/{place}" for place in starts]
            for place, (low, high) in zip(
                self.places[name], pairwise([*starts.values(), len(rows)]), strict=True
            ):
                self.rows[place] += high - low
        self.pending.clear()
        self.held = 0

    def reject(self, rejected: pl.DataFrame) -> None:
        """Writes rows that could not be used: `offset`, `reason`, `line`."""
        rows = rejected.select(
            table=pl.lit(self.table),
            file=pl.lit(self.file),
            offset="offset",
            reason="reason",
            line="line",
        )
        name = self._name(f"{self.rejected}/{self.table}", "parquet")
        self.store.write_table(name, rows.to_arrow().cast(schemas.REJECTED))

    def _name(self, folder: str, suffix: str) -> str:
        name = f"{folder}/{self.id}-{self._written[folder]:03d}.{suffix}"
        self._written[folder] += 1
        return name


def by_place(places: Mapping[str, Iterable[str]]) -> dict[str, dict[str, int]]:
    """The places of files' row groups, as a writer has them → the parts of each place."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for file, those in places.items():
        for number, place in enumerate(those):
            found[place][file] = number
    return dict(found)


def read_parts(store: Store, product: str, parts: Parts) -> pl.DataFrame | None:
    """The merged rows of some parts, or None if there are none. Parts come in the order of their names, so
    sums of floats are the same whichever task wrote its part first. No more is held than twice what merging
    leaves, or `FLUSH_ROWS`, and what is read at once.

    Raises InputError if one is lost: rows would be missing.
    """
    merge = PRODUCTS[product].merge
    frames: list[pl.DataFrame] = []
    held, most = 0, FLUSH_ROWS
    ordered = sorted(parts.items())
    for first in range(0, len(ordered), _AT_ONCE):
        try:
            found: Any = pl.from_arrow(store.read_row_groups(ordered[first : first + _AT_ONCE]))
        except FileNotFoundError as error:
            raise InputError(f"{store.uri}: parts were lost since they were written: {error}") from error
        frames.append(found)
        held += len(frames[-1])
        if held > most:
            frames = [merge(pl.concat(frames, how="diagonal"))]
            held = len(frames[0])
            most = max(FLUSH_ROWS, 2 * held)
    return merge(pl.concat(frames, how="diagonal")) if frames else None


def merge_parts(store: Store, product: str, parts: Parts, target: str) -> dict[str, Any]:
    """Parts → a file with one row group that holds the same."""
    rows = read_parts(store, product, parts)
    assert rows is not None, "a target is only planned where there are parts"
    store.write_row_groups(target, rows.sort(rows.columns).to_arrow(), [0])
    return {"rows": len(rows)}


def combine_telemetry(
    store: Store, kind: str, parts: Parts, target: str, metrics: Mapping[str, float]
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


def combine_entities(store: Store, parts: Parts, target: str, start: int = 0) -> dict[str, Any]:
    """Parts → everything known of every entity, by kind and name; services are entities too.

    `start` is the Unix time of the second 0 that the descriptions count from.
    """
    descriptions = read_parts(store, "entities", parts)
    assert descriptions is not None, "a target is only planned where there are parts"
    measured = descriptions.filter("measured").group_by("entity").agg(last_measured=pl.col("seen").max())
    merged = last_known(descriptions).join(measured, on="entity", how="left")
    services = (
        merged.drop_nulls("service")
        .group_by(entity="service")
        .agg(pl.lit("service").alias("kind"), pl.col("measured").any(), pl.col("last_measured").max())
    )
    everything = pl.concat([merged, services], how="diagonal").sort("kind", "entity")
    last = ((pl.col("last_measured") + start) * 1000).cast(pl.Datetime("ms", "UTC"))
    everything = everything.with_columns(pl.col("measured").fill_null(False), last_measured=last)
    store.write_table(target, everything.select(schemas.ENTITIES.names).to_arrow().cast(schemas.ENTITIES))
    return {"rows": len(everything)}
