"""Fewer edges: what a graph layer costs is proportional to their number."""

from __future__ import annotations

import polars as pl


def strongest(edges: pl.DataFrame, k: int) -> pl.DataFrame:
    """The `k` heaviest sources of each (time, target, kind), ties by the source's name."""
    target = ["time", "target", "kind"]
    # Ordering all edges by two columns, and only those that stay by five, is several times faster.
    heaviest_first = edges.sort("weight", "source", descending=[True, False])
    kept = heaviest_first.group_by(target, maintain_order=True).head(k)
    order = [*target, "weight", "source"]
    return kept.sort(order, descending=[name == "weight" for name in order]).select(edges.columns)
