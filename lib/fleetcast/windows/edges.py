"""The dependencies of a shard in memory, and the graph that is known at a window's origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from fleetcast.errors import InputError
from fleetcast.graphs import dependencies
from fleetcast.schemas import DEPENDENCY_KINDS
from fleetcast.windows.batch import Edges


def combine(edges: pl.DataFrame, kinds: Sequence[str]) -> pl.DataFrame:
    """Edges of several kinds → one weight per (`time`, `source`, `target`), sorted by these.

    Calls per second and numbers of instances cannot be added, so each kind is first scaled to a maximum of
    1 in each slice. `source` and `target` may be names or indices, `time` any clock. Raises InputError for
    an unknown kind.
    """
    for kind in kinds:
        if kind not in DEPENDENCY_KINDS:
            raise InputError(f"dependency kind {kind!r}, expected some of {', '.join(DEPENDENCY_KINDS)}")
    chosen = (
        edges.lazy().with_columns(pl.col("kind").cast(pl.String)).filter(pl.col("kind").is_in(list(kinds)))
    )
    scaled = chosen.with_columns(pl.col("weight") / pl.col("weight").max().over("time", "kind"))
    return dependencies.total(scaled, ["time", "source", "target"]).collect()


def last_complete(origins: Tensor, starts: Tensor, slice_steps: int) -> Tensor:
    """[B] index of the last slice that had ended at each origin, or −1 if none had.

    `origins` [B] are the times of the first targets, `starts` [S] the rising starts of the slices, in the
    same unit as `slice_steps`, the length of a slice. A slice that still runs at the origin holds records
    of the future, so no window may see it.
    """
    return torch.searchsorted(starts + slice_steps, origins, right=True) - 1


@dataclass(frozen=True)
class SliceEdges:
    """The edges of one shard, slice after slice, between indices into its entities."""

    starts: Tensor
    """[S] int64, rising: starts of the slices, in the unit of the shard's clock."""
    offsets: Tensor
    """[S + 1] int64, at least two: slice s has the edges from `offsets[s]` to `offsets[s + 1]`."""
    index: Tensor
    """[2, E] int64: sources and targets."""
    weight: Tensor
    """[E] float32."""

    @classmethod
    def build(
        cls, starts: Tensor, time: Tensor, source: Tensor, target: Tensor, weight: Tensor
    ) -> SliceEdges:
        """From the slices' starts [S] and, per edge, its slice's start, source, target and weight.

        Slices may have no edges. Raises InputError for an edge at a time at which no slice starts.
        """
        known = torch.isin(time, starts)
        if not known.all():
            stray = int(time[~known][0])
            raise InputError(f"edge at time {stray}, expected the start of one of {len(starts)} slices")
        slices = torch.searchsorted(starts, time)
        order = torch.argsort(slices, stable=True)
        counts = torch.bincount(slices, minlength=max(len(starts), 1))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(starts, offsets, torch.stack([source, target]).long()[:, order], weight.float()[order])

    def batch(self, slices: Tensor, n_nodes: int) -> Edges:
        """The graphs of B windows as one: window b has the edges of slice `slices[b]`, none where that is −1.

        `slices` [B] int64, as `last_complete` gives them; entity n of window b is node b · `n_nodes` + n.
        """
        known = slices.clamp(min=0)
        first = self.offsets[known]
        counts = torch.where(slices >= 0, self.offsets[known + 1] - first, 0)
        window = torch.repeat_interleave(counts)
        # The i-th edge of the batch is edge i − (edges of earlier windows) of its own slice.
        before = counts.cumsum(0) - counts
        edge = torch.arange(len(window)) - before[window] + first[window]
        return Edges(self.index[:, edge] + window * n_nodes, self.weight[edge])
