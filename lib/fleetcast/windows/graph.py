"""The graph at the end of the telemetry: what a forecast that is issued now sees of who depends on whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from fleetcast.store import Store
from fleetcast.windows.edges import last_complete
from fleetcast.windows.manifest import Manifest
from fleetcast.windows.views import read_edges, read_values


@dataclass(frozen=True)
class LastGraph:
    """The part of a dataset's last graph that is fit to be looked at."""

    time: int
    """Unix seconds of the start of the slice that the edges are of."""
    slice: int
    """Its length [s]."""
    kinds: tuple[str, ...]
    """Of the dependencies in it."""
    entities: int
    """How many have an edge."""
    total: int
    """How many edges there are."""
    edges: pl.DataFrame
    """`source`, `target`, `weight` between the entities that are shown, the strongest first. Each kind is
    scaled to a maximum of 1 (`edges.combine`)."""
    metric: str
    normalised: tuple[str, ...]
    """Metrics whose unit nobody knows."""
    load: dict[str, float]
    """Each shown entity's mean of the metric over the last look-back; NaN where none was observed."""


def last_graph(store: Store, manifest: Manifest, most: int) -> LastGraph | None:
    """The edges of the last slice that has ended, between the `most` entities through which most flows; None
    where there are none. One group is in memory at a time, and of it the edges that stay."""
    end = torch.tensor([manifest.start + manifest.step * manifest.steps])
    found, time = [], 0
    for shard in manifest.last_shards:
        edges = read_edges(store, manifest, shard)
        at = last_complete(end, edges.starts, manifest.slice)
        if at[0] >= 0:
            time = int(edges.starts[at[0]])
            names = pl.Series(manifest.members(shard.group), dtype=pl.String)
            graph = edges.batch(at, len(names))
            source, target = (names.gather(place) for place in graph.index.numpy().astype(np.uint32))
            found.append(pl.DataFrame({"source": source, "target": target, "weight": graph.weight.numpy()}))
    every = pl.concat(found) if found else pl.DataFrame()
    if every.is_empty():
        return None
    every = every.unique(["source", "target"])  # an edge between groups is in the shards of both
    every = every.sort("weight", "source", "target", descending=[True, False, False])
    ends = pl.concat([every.select("weight", entity=end) for end in ("source", "target")])
    flow = ends.group_by("entity").agg(pl.col("weight").sum())
    shown = flow.sort("weight", "entity", descending=[True, False])["entity"].head(most)
    among = every.filter(pl.col("source").is_in(shown.implode()), pl.col("target").is_in(shown.implode()))
    return LastGraph(
        time=time,
        slice=manifest.slice,
        kinds=_kinds(store, manifest.level, time),
        entities=len(flow),
        total=len(every),
        edges=among,
        metric=manifest.metrics[0],
        normalised=manifest.normalised,
        load=_load(store, manifest, set(shown)),
    )


def _kinds(store: Store, level: str, time: int) -> tuple[str, ...]:
    """The kinds of the dependencies that the store has of a level and slice."""
    start = pl.lit(time * 1000).cast(pl.Datetime("ms", "UTC"))
    day = str(pl.select(start.dt.date()).item())
    path = f"dependencies/date={day}/{level}.parquet"
    if not store.exists(path):
        return ()
    edges: Any = pl.from_arrow(store.read_table(path, columns=["time", "kind"]))
    return tuple(sorted(edges.filter(pl.col("time") == start)["kind"].cast(pl.String).unique()))


def _load(store: Store, manifest: Manifest, names: set[str]) -> dict[str, float]:
    load: dict[str, float] = {}
    for shard in manifest.last_shards:
        group = manifest.groups[shard.group]
        if names.isdisjoint(group):
            continue
        values = read_values(store, manifest, shard)[-manifest.history :, :, 0]
        seen = np.isfinite(values)
        sums = np.where(seen, values, 0).sum(0)
        means = np.divide(sums, seen.sum(0), out=np.full(len(group), np.nan), where=seen.any(0))
        load |= {name: float(mean) for name, mean in zip(group, means, strict=True) if name in names}
    return load
