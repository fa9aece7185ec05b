"""Errors by how busy the whole cluster is: the concurrency levels of stgnn's stability test.

    rate = cluster_rate(store, manifest)             # [T] requests per second of all entities together
    scores = by_level(batches, model, …, level_of(rate, bounds("paper", rate)))

A target belongs to the level of the time that it is of, so a level is made of the same entities as the others
and differs in when, not in whom. The levels are the paper's, or, for clusters of any other size, fifths of
the test part's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import InputError
from fleetcast.evaluation.backtest import FLOOR, Rung, forecast
from fleetcast.evaluation.metrics import Scores
from fleetcast.store import Store
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler
from fleetcast.windows.views import read_values

RATE = "request_rate"
#: Upper bound [requests/s] → name (Xue et al., section IV, Fig. 3).
LEVELS = {1000.0: "Low", 2500.0: "Medium", 5000.0: "High", 8000.0: "Very High", np.inf: "Extreme"}
#: Share of the test part's time whose rates are lower or as high → name.
FIFTHS = {
    0.2: "Lowest fifth",
    0.4: "Second fifth",
    0.6: "Middle fifth",
    0.8: "Fourth fifth",
    1.0: "Highest fifth",
}
Kind = Literal["paper", "quantiles"]
#: Steps at which a smaller share of the entities was observed have no level.
_OBSERVED = 0.5


def check(manifest: Manifest) -> None:
    """Raises InputError if the windows have no request rate."""
    if RATE not in manifest.metrics:
        raise InputError(f"needs a metric {RATE}, the data have {', '.join(manifest.metrics)}")


def cluster_rate(store: Store, manifest: Manifest) -> NDArray[np.float64]:
    """[T] requests per second of all entities together: the mean of those that were observed times their
    number, NaN where most were not. One shard in memory at a time.

    Raises InputError if the windows have no `request_rate`.
    """
    check(manifest)
    metric = manifest.metrics.index(RATE)
    total, seen = np.zeros(manifest.steps), np.zeros(manifest.steps)
    for shard in manifest.shards:
        stop = min(shard.stop, shard.last)  # beyond it lies the next shard's
        values = read_values(store, manifest, shard)[shard.start - shard.first : stop - shard.first]
        of_metric = values[:, :, metric].astype(np.float64)
        total[shard.start : stop] += np.nansum(of_metric, axis=1)
        seen[shard.start : stop] += np.isfinite(of_metric).sum(axis=1)
    entities = manifest.entities
    return np.where(seen >= _OBSERVED * entities, total / np.maximum(seen, 1) * entities, np.nan)


def bounds(kind: Kind, rate: NDArray[np.float64]) -> list[float]:
    """The upper bounds of the levels [requests/s]: the paper's, or those of fifths of the test part's time,
    of which these are the cluster's rates."""
    if kind == "paper":
        return list(LEVELS)
    known = rate[np.isfinite(rate)]
    shares = [share for share in FIFTHS if share < 1]
    return [*(np.quantile(known, shares) if len(known) else [0.0] * len(shares)), np.inf]


def level_of(rate: NDArray[np.float64], bounds: Sequence[float] = tuple(LEVELS)) -> NDArray[np.int64]:
    """[T] the place of each step's level among those that end at `bounds`; −1 where the rate is not known."""
    found = np.searchsorted(list(bounds), rate, side="left")
    return np.where(np.isfinite(rate), found, -1)


def by_level(
    batches: Iterable[Batch],
    rung: Rung,
    scaler: Scaler,
    quantiles: tuple[float, ...],
    horizon: int,
    shifts: NDArray[np.float64],
    levels: NDArray[np.int64],
) -> list[Scores]:
    """The scores of a rung on some batches, for each of the five levels; `levels` [T] as `level_of` gives
    them."""
    floor = np.asarray(scaler.std) * FLOOR
    total = [Scores.zeros(horizon, quantiles, floor, scaler.mean) for _ in LEVELS]
    for batch in batches:
        centre, spread = scaler.of(batch.nodes[: batch.own].numpy())
        y, seen = batch.y.double().numpy() * spread + centre, batch.y_mask.numpy()
        given = forecast(rung, batch, scaler, quantiles, shifts)
        at = levels[batch.origins.numpy()[:, None] + np.arange(horizon)]
        for level in np.unique(at[at >= 0]):
            mask = seen & (at == level)[:, :, None, None]
            total[level] += Scores.of(
                y, mask, given.mean, given.quantiles, quantiles, floor, given.median, scaler.mean, spread
            )
    return total
