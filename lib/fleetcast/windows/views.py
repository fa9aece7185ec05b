"""An open shard: its steps once in memory, its windows as views.

A window is an origin. Assembling a batch copies the windows of that batch and nothing else, so what is held
does not grow with the look-back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from fleetcast.store import Store
from fleetcast.windows.batch import Batch, Edges
from fleetcast.windows.calendar import time_features
from fleetcast.windows.edges import SliceEdges, last_complete
from fleetcast.windows.manifest import Manifest, Scaler, Shard


class OpenShard:
    """The steps [first, last) of one group and its border, scaled, with gaps filled and what was observed
    remembered."""

    @classmethod
    def read(
        cls,
        store: Store,
        manifest: Manifest,
        shard: Shard,
        scaler: Scaler | None = None,
        known: Mapping[str, int] | None = None,
    ) -> OpenShard:
        """Reads the shard. `scaler` and `known` (entity → its place) replace the dataset's own where a model
        brings others."""
        values, edges = read_values(store, manifest, shard, border=True), read_edges(store, manifest, shard)
        nodes = manifest.nodes(shard.group)
        if known is not None:
            nodes = np.array([known.get(name, -1) for name in manifest.members(shard.group)], np.int64)
        own = len(manifest.groups[shard.group])
        return cls(manifest, shard, values, edges, nodes, own, scaler)

    def __init__(
        self,
        manifest: Manifest,
        shard: Shard,
        values: NDArray[np.float32],
        edges: SliceEdges,
        nodes: NDArray[np.int64],
        own: int,
        scaler: Scaler | None = None,
    ) -> None:
        """Of values [T, N, F] in original units, NaN where missing, of which the first `own` entities are the
        group's and the others its border; and the edges between them."""
        self.manifest = manifest
        self.shard = shard
        self.nodes = nodes
        """[N] int64 which entities they are, as in a batch."""
        self.own = own
        mean, std = (part.astype(np.float32) for part in (scaler or manifest.scaler).of(nodes))
        scaled = (values - mean) / std
        filled = interpolate(scaled, manifest.max_gap)
        self._observed = torch.from_numpy(np.isfinite(scaled))
        self._scaled = torch.from_numpy(np.nan_to_num(scaled, copy=False, posinf=0, neginf=0))
        self._gaps = not bool(self._observed.all())
        self._filled = (
            torch.from_numpy(np.nan_to_num(filled, copy=False, posinf=0, neginf=0))
            if self._gaps
            else self._scaled
        )
        self._since = torch.from_numpy(steps_since_observed(self._observed.numpy())) if self._gaps else None
        self._calendar = time_features(
            manifest.start,
            manifest.step,
            shard.first,
            shard.last + manifest.horizon,
            manifest.calendar,
        )
        self._edges = edges
        self._scaler = scaler

    def of(self, values: NDArray[np.float32]) -> OpenShard:
        """The same shard with other values [T, N, F] in original units."""
        return OpenShard(self.manifest, self.shard, values, self._edges, self.nodes, self.own, self._scaler)

    def __getstate__(self) -> dict[str, Any]:
        """Arrays for tensors: an object store then keeps one copy for all processes that read it."""
        return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():  # such arrays are read-only, and nothing here writes to them
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensors = {k: torch.from_numpy(v) for k, v in state.items() if isinstance(v, np.ndarray)}
        self.__dict__ |= state | tensors | {"nodes": state["nodes"]}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that windows are views of."""
        arrays = [self._observed, self._scaled, self._calendar]
        if self._since is not None:
            arrays += [self._filled, self._since]
        return sum(array.nbytes for array in arrays)

    def batch(self, origins: NDArray[np.int64], history: int | None = None) -> Batch:
        """The windows with these origins, of the dataset's look-back or a shorter one.

        An origin at the end of the telemetry gives a batch whose targets are all unobserved.
        """
        m = self.manifest
        at = torch.from_numpy(origins)[:, None] - self.shard.first
        past, future = at + torch.arange(-(history or m.history), 0), at + torch.arange(m.horizon)
        y, y_mask = (part[:, :, : self.own] for part in self._observations(future))
        seasonal_x, seasonal_x_mask = self._seasons(past)
        seasonal, seasonal_mask = self._seasons(future)
        return Batch(
            x=self._look_back(past),
            mask=_take(self._observed, past),
            time_x=_take(self._calendar, past),
            time_y=_take(self._calendar, future),
            seasonal_x=seasonal_x,
            seasonal_x_mask=seasonal_x_mask,
            seasonal=seasonal,
            seasonal_mask=seasonal_mask,
            edges=self._graphs(origins),
            nodes=torch.from_numpy(self.nodes),
            y=y,
            y_mask=y_mask,
            origins=torch.from_numpy(origins),
        )

    def last_steps(self, most: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The last `most` steps or all there are, of own entities: scaled values [T, O, F], and which are
        observed."""
        return self._scaled[-most:, : self.own].numpy(), self._observed[-most:, : self.own].numpy()

    def _seasons(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, N, F, S] values one lag before `steps` [B, K], and which are observed."""
        lags = self.manifest.lags
        if not lags:
            none = torch.zeros(*steps.shape, *self._scaled.shape[1:], 0)
            return none, none > 0
        values, observed = zip(*(self._observations(steps - lag) for lag in lags), strict=True)
        return torch.stack(values, -1), torch.stack(observed, -1)

    def _observations(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, N, F] values at `steps` [B, K], and which are observed: none before or after the shard."""
        at = steps.clamp(0, len(self._scaled) - 1)
        values, observed = _take(self._scaled, at), _take(self._observed, at)
        outside = steps != at
        if outside.any():
            values[outside] = 0.0
            observed[outside] = False
        return values, observed

    def _look_back(self, past: Tensor) -> Tensor:
        """Filled values at the steps `past` [B, L], without interpolation that leans on the future.

        A gap that is still open at the origin was filled with the help of values after it, if it was short
        enough to be filled. There the last value is held instead, for as long as a gap may be.
        """
        x = _take(self._filled, past)
        if self._since is None:
            return x
        final = past[:, -1]
        open_for = self._since.index_select(0, final)  # [B, N, F] steps since the last observation
        short = (open_for > 0) & (open_for <= final[:, None, None].clamp(max=self.manifest.max_gap))
        window, entity, metric = short.nonzero(as_tuple=True)
        width = open_for[window, entity, metric].long()
        last_seen = self._scaled[final[window] - width, entity, metric]
        # One entry for each step of each open gap: the i-th of a gap is i steps before the end.
        width = width.clamp(max=past.shape[1])
        gap = torch.repeat_interleave(width)
        back = torch.arange(len(gap)) - (width.cumsum(0) - width)[gap]
        x[window[gap], past.shape[1] - 1 - back, entity[gap], metric[gap]] = last_seen[gap]
        return x

    def _graphs(self, origins: NDArray[np.int64]) -> Edges:
        m = self.manifest
        seconds = torch.from_numpy(origins * m.step + m.start)
        slices = last_complete(seconds, self._edges.starts, m.slice)
        return self._edges.batch(slices, len(self.nodes))


def _take(steps: Tensor, at: Tensor) -> Tensor:
    """[T, …] at the steps [B, K] → [B, K, …]. Whole rows are copied, much faster than by `steps[at]`."""
    return steps.index_select(0, at.flatten()).unflatten(0, at.shape)


def read_values(store: Store, manifest: Manifest, shard: Shard, border: bool = False) -> NDArray[np.float32]:
    """[T, N, F] in original units, NaN where missing: of a group's own entities, or of its border as well."""
    table = store.read_table(shard.path, columns=list(manifest.metrics))
    columns = [table[metric].to_numpy() for metric in manifest.metrics]
    shape = (shard.last - shard.first, len(manifest.members(shard.group)), len(columns))
    values = np.stack(columns, axis=-1).astype(np.float32, copy=False).reshape(shape)
    return values if border else values[:, : len(manifest.groups[shard.group])]


def read_edges(store: Store, manifest: Manifest, shard: Shard) -> SliceEdges:
    """The shard's edges between places among the members, on the grid of all slices it touches: one without
    edges is empty, not absent."""
    table: Any = pl.from_arrow(store.read_table(shard.edges))
    low = manifest.start + manifest.step * shard.first
    high = manifest.start + manifest.step * shard.last
    starts = torch.arange(low // manifest.slice - 1, -(-high // manifest.slice)) * manifest.slice
    edges = table.select(
        (pl.col("time").dt.epoch("s")).cast(pl.Int64),
        pl.col("source", "target").cast(pl.Int64),
        pl.col("weight").cast(pl.Float32),
    ).filter(pl.col("time").is_between(int(starts[0]), int(starts[-1])))
    columns = [torch.from_numpy(edges[name].to_numpy().copy()) for name in edges.columns]
    return SliceEdges.build(starts, *columns)


def interpolate(values: NDArray[np.float32], max_gap: int) -> NDArray[np.float32]:
    """[T, …] with gaps of at most `max_gap` steps filled along straight lines; longer ones, and those at the
    ends, stay NaN."""
    observed = np.isfinite(values)
    if observed.all():
        return values
    step = np.arange(len(values), dtype=np.int32).reshape(-1, *[1] * (values.ndim - 1))
    before = np.maximum.accumulate(np.where(observed, step, np.int32(-1)), axis=0)
    after = np.minimum.accumulate(np.where(observed, step, np.int32(len(values)))[::-1], axis=0)[::-1]
    fill = ~observed & (before >= 0) & (after < len(values)) & (after - before - 1 <= max_gap)
    left = np.take_along_axis(values, np.clip(before, 0, None), axis=0)
    right = np.take_along_axis(values, np.clip(after, None, len(values) - 1), axis=0)
    share = (step - before) / np.maximum(after - before, 1)
    return np.where(fill, left + (right - left) * share, values).astype(np.float32)


def steps_since_observed(observed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[T, …] steps since the last observation: 0 where observed; from before the start where none was."""
    step = np.arange(len(observed), dtype=np.int32).reshape(-1, *[1] * (observed.ndim - 1))
    last = np.maximum.accumulate(np.where(observed, step, np.int32(-1)), axis=0)
    return step - last
