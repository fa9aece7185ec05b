"""Dependencies from telemetry alone, for sources that record neither calls nor jobs nor placements."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fleetcast.errors import InputError
from fleetcast.graphs import dependencies

#: Targets per matrix product: memory is O(N · block), never N².
_BLOCK = 512
#: Differences that vary by less than this part of the signal are rounding, not movement.
_STILL = 1e-6


def edges(
    values: NDArray[np.float32],
    names: list[str],
    time: datetime,
    k: int = 8,
    lag: int = 1,
    minimum: float = 0.3,
) -> pl.DataFrame:
    """The `k` sources that lead each target best: corr(Δx_source[t − lag], Δx_target[t]) as weight.

    `values` is [T, N] with NaN for missing, `names` the N entities, `time` the slice's start, `lag` in
    steps. Only positive correlations of at least `minimum` become edges. Differences, because levels share
    the daily cycle and would join every entity to every other. A missing difference counts as an average
    one, so a pair that is seldom observed gets a weight too small rather than too large; constant and empty
    columns get no edge. Raises InputError if names and columns differ in number, or the lag is negative or
    too long.
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise InputError(
            f"correlation: values of shape {values.shape}, expected [T, {len(names)}], one column a name"
        )
    if not 0 <= lag <= len(values) - 3:
        raise InputError(f"correlation: lag {lag}, expected 0 to {len(values) - 3} for {len(values)} steps")
    changes = np.diff(values, axis=0)
    scale = np.nan_to_num(np.abs(values)).max(axis=0)
    leading = _standardised(changes[: len(changes) - lag], scale)
    following = _standardised(changes[lag:], scale)

    found = [_strongest(leading, following, first, k, minimum) for first in range(0, len(names), _BLOCK)]
    source, target, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
    labels = np.array(names, dtype=object)
    terms = pl.LazyFrame(
        {"source": labels[source], "target": labels[target], "weight": weight},
        schema={"source": pl.String, "target": pl.String, "weight": pl.Float32},
    )
    return dependencies.of_kind("correlation", terms.with_columns(time=pl.lit(time)))


def _standardised(changes: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns of mean 0 whose products are correlations: Σ z_i z_j over rows lies in [−1, 1]."""
    seen = np.isfinite(changes)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, changes, 0).sum(axis=0) / count
    centred = np.where(seen, changes - mean, 0)
    deviation = np.sqrt((centred**2).sum(axis=0) / count)
    moves = deviation > _STILL * scale
    return np.asarray(
        np.where(moves, centred / np.where(moves, deviation, 1) / np.sqrt(len(changes)), 0), dtype=np.float32
    )


def _strongest(
    leading: NDArray[np.float32], following: NDArray[np.float32], first: int, k: int, minimum: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Sources, targets and correlations of the targets from `first` on, one block of them."""
    block = leading.T @ following[:, first : first + _BLOCK]
    columns = np.arange(block.shape[1])
    block[first + columns, columns] = 0  # an entity does not lead itself
    best = np.argsort(-block, axis=0, kind="stable")[:k]
    weight = np.take_along_axis(block, best, axis=0)
    row, column = np.nonzero((weight >= minimum) & (weight > 0))
    return best[row, column], first + column, weight[row, column]
