"""How well a rung foresees high load: errors on the top of the load, alarms, the time of the peak.

    limit = thresholds([values])                      # [N, F] of the training part
    peaks = Peaks.of(y, y_mask, mean, median, quantiles, levels, limit) + Peaks.of(…)
    recall(peaks)                                     # [F, Q]

High is what lies above the entity's own 95 % quantile of the training part. Strictly above: an entity that
never changes is never high. Letters as in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fleetcast.errors import InputError
from fleetcast.evaluation.metrics import ABSOLUTE, COUNT, Counts, Floats, ratio

#: Load above this quantile of an entity's training part is high.
TOP = 0.95


def thresholds(stretches: Sequence[NDArray[np.floating[Any]]]) -> NDArray[np.float32]:
    """[N, F] the TOP quantile of stretches of time [T, N, F] of the same entities.

    It is one of the observed values, so that a target of the same value is not above it by rounding; NaN
    where nothing was observed.
    """
    values = np.concatenate(list(stretches))
    if not len(values):
        return np.full(values.shape[1:], np.nan, np.float32)
    observed = np.isfinite(values)
    rising = np.sort(np.where(observed, values, np.inf), axis=0)
    count = observed.sum(0)
    at = np.ceil(TOP * np.maximum(count - 1, 0)).astype(np.int64)
    found = np.take_along_axis(rising, at[None], axis=0)[0]
    return np.where(count > 0, found, np.nan).astype(np.float32)


@dataclass(frozen=True)
class Peaks:
    """Sums and counts per metric that add up, in the targets' units."""

    levels: tuple[float, ...]
    """Q quantile levels."""
    n: Counts
    """[F] observed targets above the threshold."""
    abs_error: Floats
    """[F] Σ |median forecast − y| over them."""
    error: Floats
    """[F] Σ (mean forecast − y) over them."""
    events: Counts
    """[F] pairs of window and entity with any observed target above the threshold."""
    alarms: Counts
    """[F, Q] pairs whose quantile is above the threshold at any step with an observed target."""
    hits: Counts
    """[F, Q] pairs with both."""
    timed: Counts
    """[F] pairs whose whole horizon is observed and whose targets are not all alike."""
    off: Counts
    """[F] Σ |step of the highest median − step of the highest target| over them."""

    @classmethod
    def zeros(cls, metrics: int, levels: Sequence[float]) -> Peaks:
        """Nothing counted yet: the neutral element of `+`."""

        def none(*shape: int) -> Counts:
            return np.zeros((metrics, *shape), np.int64)

        q = len(levels)
        sums = np.zeros(metrics), np.zeros(metrics)
        return cls(tuple(levels), none(), *sums, none(), none(q), none(q), none(), none())

    @classmethod
    def of(
        cls,
        y: ArrayLike,
        y_mask: ArrayLike,
        mean: ArrayLike,
        median: ArrayLike,
        quantiles: ArrayLike,
        levels: Sequence[float],
        limit: ArrayLike,
    ) -> Peaks:
        """One batch in original units: `y`, `y_mask` (observed), `mean`, `median` [B, H, N, F], `quantiles`
        [B, H, N, F, Q] at `levels`, and the threshold `limit` [N, F].

        An entity with the threshold NaN has no high load and no alarms. Raises InputError if shapes disagree.
        """
        y, seen = np.asarray(y, np.float64), np.asarray(y_mask, dtype=bool)
        middle, bands, limit = np.asarray(median), np.asarray(quantiles), np.asarray(limit)
        if bands.shape != (*y.shape, len(levels)) or limit.shape != y.shape[2:]:
            raise InputError(
                f"quantiles {bands.shape} and limit {limit.shape}: "
                f"expected {(*y.shape, len(levels))} and {y.shape[2:]}"
            )
        high = seen & (y > limit)
        event = np.any(high, axis=1)
        alarm = np.any(seen[..., None] & (bands > limit[..., None]), axis=1)
        # Elsewhere no peak has a time: it is not known or nowhere.
        timed = seen.all(1) & (y.max(1) > y.min(1))
        off = np.abs(middle.argmax(1) - y.argmax(1))
        every = (0, 1, 2)
        return cls(
            levels=tuple(levels),
            n=high.sum(every),
            abs_error=np.where(high, np.abs(middle - y), 0).sum(every),
            error=np.where(high, np.asarray(mean) - y, 0).sum(every),
            events=event.sum((0, 1)),
            alarms=alarm.sum((0, 1)),
            hits=(alarm & event[..., None]).sum((0, 1)),
            timed=timed.sum((0, 1)),
            off=np.where(timed, off, 0).sum((0, 1)),
        )

    def __add__(self, other: Peaks) -> Peaks:
        """Both together. Raises InputError if they count different things."""
        mine, theirs = ((p.levels, p.n.shape) for p in (self, other))
        if mine != theirs:
            raise InputError(f"peaks of (levels, metrics) {theirs}: expected {mine}")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _ARRAYS})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything, `levels` as well, as arrays to save; `from_arrays` reads them."""
        return {"levels": np.array(self.levels)} | {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Peaks:
        """What `arrays` gave."""
        levels = tuple(arrays["levels"].tolist())
        return cls(levels, **{name: arrays[name] for name in _ARRAYS})


_ARRAYS = tuple(field.name for field in fields(Peaks) if field.name != "levels")


# -- figures -------------------------------------------------------------------------------------------------


def mae(peaks: Peaks) -> Floats:
    """[F] mean absolute error of the median on high load, in the target's units."""
    return ratio(peaks.abs_error, peaks.n)


def bias(peaks: Peaks) -> Floats:
    """[F] mean of mean forecast − target on high load; below 0 where peaks are forecast too low."""
    return ratio(peaks.error, peaks.n)


def precision(peaks: Peaks) -> Floats:
    """[F, Q] the share of alarms that were right."""
    return ratio(peaks.hits, peaks.alarms)


def recall(peaks: Peaks) -> Floats:
    """[F, Q] the share of events that had an alarm."""
    return ratio(peaks.hits, np.broadcast_to(peaks.events[:, None], peaks.hits.shape))


def misses(peaks: Peaks) -> Counts:
    """[F, Q] events without an alarm."""
    return peaks.events[:, None] - peaks.hits


def false_alarms(peaks: Peaks) -> Counts:
    """[F, Q] alarms without an event."""
    return peaks.alarms - peaks.hits


def time_to_peak(peaks: Peaks) -> Floats:
    """[F] mean absolute error of the peak's time in steps. Of a level forecast the peak is the first step."""
    return ratio(peaks.off, peaks.timed)


def by_time_of_day(
    by_origin: Mapping[int, NDArray[np.float64]], start: int, step: int, buckets: int = 24
) -> Floats:
    """[buckets, F] MAE by the targets' time of day in UTC; NaN where none lies.

    `by_origin` has the sums of `metrics.per_origin` [K, H, F]; `start` is the time of step 0 in Unix seconds,
    `step` its width in seconds.
    """
    origins = np.array(sorted(by_origin), dtype=np.int64)
    sums = np.stack([by_origin[origin] for origin in origins.tolist()]).swapaxes(1, 2)  # [T, H, K, F]
    time = start + step * (origins[:, None] + np.arange(sums.shape[1]))
    bucket = time % 86_400 * buckets // 86_400
    total = np.zeros((buckets, *sums.shape[2:]))
    np.add.at(total, bucket, sums)
    return ratio(total[:, ABSOLUTE], total[:, COUNT])
