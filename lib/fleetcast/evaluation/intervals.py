"""Calibrated quantiles by split conformal prediction, from residual histograms that merge.

For every quantile level q the residuals y − ŷ_q of the validation part are counted. Their own q-quantile is
the shift that makes y ≤ ŷ_q + shift true for the share q of exchangeable data, however wrong ŷ_q was (split
conformal: Lei et al. 2018, J. Am. Stat. Assoc. 113; of quantile regressions: Romano, Patterson & Candès 2019;
here one-sided). A point forecast takes the same way with ŷ_q = ŷ at every level, so a naive rung gets its
quantiles as a model does.

    histogram = ResidualHistogram.zeros(horizon, metrics, levels)
    histogram.add(y, y_mask, quantiles)              # on every worker; then h1 + h2 + …
    calibrated = calibrate(quantiles, histogram.shifts())

Letters: B windows, H horizon steps, N entities, F metrics, Q levels, K buckets of horizon steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fleetcast.errors import InputError

#: Neighbouring horizon steps share their residuals, so that a long horizon needs no more memory than a short.
MAX_BUCKETS = 24
#: The grid of residuals, in training standard deviations: bins of 0.0005 at zero, of 0.3 % of the residual
#: beyond. A shift is a bin's upper edge, so it lies above the exact residual by up to so much, never below.
INNER_BINS = 4000
LIMIT = 20.0
_LINEAR = 0.2
_STRETCH = INNER_BINS / 2 / np.arcsinh(LIMIT / _LINEAR)
BINS = INNER_BINS + 2


def bucket_of(step: ArrayLike, horizon: int) -> NDArray[np.int64]:
    """The bucket of horizon steps 0 … horizon − 1: at most MAX_BUCKETS, rising, of nearly equal size."""
    return np.asarray(step, dtype=np.int64) * min(horizon, MAX_BUCKETS) // horizon


@dataclass
class ResidualHistogram:
    """How often each residual was seen, in scaled units. Adding up is exact: the counts are integers."""

    levels: tuple[float, ...]
    """Q quantile levels."""
    horizon: int
    """H."""
    counts: NDArray[np.int64]
    """[K, F, Q, BINS]; the first and the last bin are open."""
    largest: NDArray[np.float64]
    """[K, F, Q] the largest residual; −∞ where there is none."""

    @classmethod
    def zeros(cls, horizon: int, metrics: int, levels: Sequence[float]) -> ResidualHistogram:
        """Nothing counted yet."""
        shape = (min(horizon, MAX_BUCKETS), metrics, len(levels))
        return cls(tuple(levels), horizon, np.zeros((*shape, BINS), np.int64), np.full(shape, -np.inf))

    def add(self, y: ArrayLike, y_mask: ArrayLike, predicted: ArrayLike) -> None:
        """Counts the residuals of one batch.

        `y` and `y_mask` (observed) are [B, H, N, F]; `predicted` [B, H, N, F, Q], or [B, H, N, F] for a point
        forecast that stands for every level. Raises InputError if shapes disagree, or an observed target or
        its forecast is not a finite number.
        """
        y, predicted, seen = np.asarray(y), np.asarray(predicted), np.asarray(y_mask, dtype=bool)
        buckets, metrics, levels, _ = self.counts.shape
        if y.ndim != 4 or seen.shape != y.shape or y.shape[1] != self.horizon or y.shape[3] != metrics:
            raise InputError(
                f"y {y.shape}, y_mask {seen.shape}: expected [B, {self.horizon}, N, {metrics}] of both"
            )
        if predicted.shape == y.shape:
            predicted = np.broadcast_to(predicted[..., None], (*y.shape, levels))
        if predicted.shape != (*y.shape, levels):
            raise InputError(f"predicted {predicted.shape}: expected {(*y.shape, levels)} or {y.shape}")
        for bucket in range(buckets):
            steps = slice(*np.searchsorted(self._buckets(), [bucket, bucket + 1]))
            for metric in range(metrics):
                here = seen[:, steps, :, metric]
                if here.any():
                    target = y[:, steps, :, metric][here].astype(np.float64)
                    self._count(bucket, metric, target[:, None] - predicted[:, steps, :, metric][here])

    def _buckets(self) -> NDArray[np.int64]:
        return bucket_of(np.arange(self.horizon), self.horizon)

    def _count(self, bucket: int, metric: int, residuals: NDArray[np.float64]) -> None:
        """Adds the residuals [points, Q] of one bucket and metric."""
        wrong = int((~np.isfinite(residuals)).any(axis=1).sum())
        if wrong:
            raise InputError(
                f"residuals: not a finite number at {wrong} of {len(residuals)} observed targets"
            )
        levels = len(self.levels)
        flat = _bin_of(residuals) + np.arange(levels) * BINS
        counted = np.bincount(flat.ravel(), minlength=levels * BINS)
        self.counts[bucket, metric] += counted.reshape(levels, BINS)
        self.largest[bucket, metric] = np.maximum(self.largest[bucket, metric], residuals.max(axis=0))

    def __add__(self, other: ResidualHistogram) -> ResidualHistogram:
        """Both together. Raises InputError if they count different things."""
        mine, theirs = ((h.levels, h.horizon, h.counts.shape[1]) for h in (self, other))
        if mine != theirs:
            raise InputError(f"residuals of (levels, horizon, metrics) {theirs}: expected {mine}")
        largest = np.maximum(self.largest, other.largest)
        return ResidualHistogram(self.levels, self.horizon, self.counts + other.counts, largest)

    def shift(self, level: float) -> NDArray[np.float64]:
        """[K, F] what to add to the quantile at `level`, in scaled units.

        The ⌈(n + 1) q⌉-th smallest of the n residuals, or the upper edge of its bin: coverage is at least q.
        With too few residuals for the level it is the largest of them; with none at all 0.
        """
        q = self.levels.index(level)
        counts, largest = self.counts[:, :, q], self.largest[:, :, q]
        n = counts.sum(axis=-1)
        # Rounded first: 20 · 0.95 must be 19 and not a hair more.
        rank = np.clip(np.ceil(np.round((n + 1) * level, 6)), 1, np.maximum(n, 1))
        position = (counts.cumsum(axis=-1) < rank[..., None]).sum(axis=-1)
        return np.where(n > 0, np.minimum(_upper_edge(position), largest), 0.0)

    def shifts(self) -> NDArray[np.float64]:
        """[K, F, Q] the shifts of all levels: all that a forecast needs to keep."""
        return np.stack([self.shift(level) for level in self.levels], axis=-1)

    def save(self, file: IO[bytes]) -> None:
        """Writes NumPy's compressed archive; nearly all counts are zero, so it is small."""
        np.savez_compressed(
            file, levels=self.levels, horizon=self.horizon, counts=self.counts, largest=self.largest
        )

    @classmethod
    def load(cls, file: IO[bytes]) -> ResidualHistogram:
        """What `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            levels = tuple(float(level) for level in arrays["levels"])
            return cls(levels, int(arrays["horizon"]), arrays["counts"], arrays["largest"])


def calibrate(quantiles: NDArray[Any], shifts: NDArray[np.float64]) -> NDArray[Any]:
    """Quantiles [B, H, N, F, Q] in scaled units, moved by shifts [K, F, Q] and made to rise along Q.

    Sorting the levels of each step can only bring crossed quantiles nearer to the true ones (Chernozhukov,
    Fernández-Val & Galichon 2010). A point forecast is given as `np.repeat(point[..., None], Q, axis=-1)`.
    """
    horizon = quantiles.shape[1]
    expected = (min(horizon, MAX_BUCKETS), *quantiles.shape[3:])
    if shifts.shape != expected:
        raise InputError(f"shifts {shifts.shape}: expected {expected} for quantiles {quantiles.shape}")
    per_step = shifts[bucket_of(np.arange(horizon), horizon)][None, :, None]
    return np.sort(quantiles + per_step.astype(quantiles.dtype), axis=-1)


def _bin_of(residuals: NDArray[np.float64]) -> NDArray[np.int64]:
    position = np.floor(np.arcsinh(residuals / _LINEAR) * _STRETCH) + INNER_BINS // 2 + 1
    return np.clip(position, 0, BINS - 1).astype(np.int64)


def _upper_edge(position: NDArray[np.int64]) -> NDArray[np.float64]:
    """The residual that ends a bin; ∞ for the last one."""
    edge = _LINEAR * np.sinh((position - INNER_BINS // 2) / _STRETCH)
    return np.where(position < BINS - 1, edge, np.inf)
