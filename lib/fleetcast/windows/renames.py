"""Instances that were renamed: a rollout ends one and starts another, whose load goes on under a new name."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa


def lives(telemetry: pa.Table) -> pl.DataFrame:
    """Rows of `entity` and `time` → each `entity` with the `first` and the `last` time [Unix s]."""
    rows: Any = pl.from_arrow(telemetry)
    seconds = pl.col("time").dt.epoch("s")
    found: pl.DataFrame = (
        rows.with_columns(pl.col("entity").cast(pl.String))
        .group_by("entity")
        .agg(first=seconds.min(), last=seconds.max())
    )
    return found.sort("entity")


def successors(every: pl.DataFrame, within: int) -> dict[str, tuple[str, ...]]:
    """`entity`, `service`, `first` and `last` → who took the place of whom: each newest name with the earlier
    ones of its series, the first first.

    In a service, each that begins takes the place of the one whose end is nearest, of those that ended up to
    `within` seconds before or will up to `within` after and whom nobody has followed yet. The older must have
    lived alone for longer than they overlap, and the newer outlive it: two that come together are no rename.
    """
    earlier: dict[str, tuple[str, ...]] = {}
    for group in every.sort("service", "first", "entity").partition_by("service", maintain_order=True):
        ended: list[tuple[int, int, str]] = []  # last, first and name of those that may be followed
        for name, first, last in group.select("entity", "first", "last").iter_rows():
            near = [
                (abs(first - end), end, old)
                for end, begun, old in ended
                if abs(first - end) <= within and begun < first - max(0, end - first) and end < last
            ]
            if near:
                old = min(near)[2]
                ended = [one for one in ended if one[2] != old]
                earlier[name] = (*earlier.pop(old, ()), old)
            ended = [one for one in ended if one[0] >= first - within]
            ended.append((last, first, name))
    return earlier
