"""Forecast errors as states that merge: every figure is made of sums and counts, never of means of means.

    scores = Scores.of(y, y_mask, mean, quantiles, levels, floor) + Scores.of(...)
    mae(scores)            # [H, F], one figure per horizon step
    mae(scores.pooled())   # [1, F], over all steps

A point error is taken of the functional that it elicits (Gneiting 2011, J. Am. Stat. Assoc. 106): absolute
errors (MAE, WAPE, MASE, MAPE, scaled MAE) of the median forecast, squared ones (MSE, RMSE, R²) of the mean.
Else a skewed load would make a model that forecasts its mean well look worse than one that does not.

Letters: B windows, H horizon steps, N entities, F metrics, Q quantile levels, I central intervals. A figure
that nothing was counted for is NaN in arrays and None in JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fleetcast.errors import InputError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

#: Nominal coverages of the central intervals; one is counted where both its ends are among the levels.
INTERVALS = (0.5, 0.8, 0.9)

#: What `per_origin` sums up, in the order of its second axis.
ERROR, COUNT, ABSOLUTE, SQUARED, PINBALL = range(5)


@dataclass(frozen=True)
class Scores:
    """Sums and counts over observed targets, per horizon step and metric, in the targets' units."""

    levels: tuple[float, ...]
    """Q quantile levels, rising."""
    floor: tuple[float, ...]
    """F floors: the absolute percentage error counts only where |y| reaches the floor of its metric."""
    centre: tuple[float, ...]
    """F values near the targets' means, from which `y` and `y_squared` are counted so that R² keeps its
    digits where a load varies little about a large level."""
    n: Counts
    """[H, F] observed targets; a zero is a target like any other."""
    abs_error: Floats
    """[H, F] Σ |y − median forecast|."""
    scaled_error: Floats
    """[H, F] Σ |y − median forecast| ÷ the standard deviation of the training part: the metric's, or the
    entity's where the dataset is scaled by entity."""
    squared_error: Floats
    """[H, F] Σ (y − mean forecast)²."""
    y: Floats
    """[H, F] Σ (y − centre)."""
    y_squared: Floats
    """[H, F] Σ (y − centre)²."""
    y_abs: Floats
    """[H, F] Σ |y|."""
    ape: Floats
    """[H, F] Σ |y − median forecast| / |y| where |y| ≥ floor."""
    ape_n: Counts
    """[H, F] targets with |y| ≥ floor."""
    pinball: Floats
    """[H, F, Q] Σ max(q (y − ŷ_q), (q − 1) (y − ŷ_q))."""
    over: Floats
    """[H, F, Q] Σ max(ŷ_q − y, 0): what stays idle if ŷ_q is provisioned."""
    below: Counts
    """[H, F, Q] targets with y ≤ ŷ_q."""
    inside: Counts
    """[H, F, I] targets inside each central interval, its ends included."""
    interval_score: Floats
    """[H, F, I] Σ of interval scores (Gneiting & Raftery 2007, eq. 43)."""

    @classmethod
    def zeros(
        cls, horizon: int, levels: Sequence[float], floor: ArrayLike, centre: ArrayLike | None = None
    ) -> Scores:
        """Nothing counted yet: the neutral element of `+`.

        `floor` [F] has one positive value per metric, `centre` [F] one of any sign (0 if not given).
        """
        floors = tuple(float(value) for value in np.atleast_1d(np.asarray(floor, dtype=np.float64)))
        if not all(value > 0 for value in floors):
            raise InputError(f"floor {floors}: expected positive numbers, one per metric")
        given = np.zeros(len(floors)) if centre is None else np.asarray(centre, np.float64)
        centres = tuple(float(value) for value in np.atleast_1d(given))
        if len(centres) != len(floors):
            raise InputError(f"centre {centres}: expected {len(floors)} numbers, one per metric")
        cell = (horizon, len(floors))
        by_level, by_interval = (*cell, len(levels)), (*cell, len(central(levels)))
        return cls(
            levels=tuple(levels),
            floor=floors,
            centre=centres,
            n=np.zeros(cell, np.int64),
            abs_error=np.zeros(cell),
            scaled_error=np.zeros(cell),
            squared_error=np.zeros(cell),
            y=np.zeros(cell),
            y_squared=np.zeros(cell),
            y_abs=np.zeros(cell),
            ape=np.zeros(cell),
            ape_n=np.zeros(cell, np.int64),
            pinball=np.zeros(by_level),
            over=np.zeros(by_level),
            below=np.zeros(by_level, np.int64),
            inside=np.zeros(by_interval, np.int64),
            interval_score=np.zeros(by_interval),
        )

    @classmethod
    def of(
        cls,
        y: ArrayLike,
        y_mask: ArrayLike,
        mean: ArrayLike,
        quantiles: ArrayLike | None,
        levels: Sequence[float],
        floor: ArrayLike,
        median: ArrayLike | None = None,
        centre: ArrayLike | None = None,
        scale: ArrayLike = 1.0,
    ) -> Scores:
        """The scores of one batch in original units.

        `y`, `y_mask` (observed), `mean` and `median` (the mean if not given) are [B, H, N, F]; `quantiles`
        [B, H, N, F, Q] at `levels`, or None with no levels; `floor` and `centre` as in `zeros`; `scale`
        the standard deviations, [F] or [N, F]. Raises InputError if shapes disagree or an observed target or
        its forecast is not a finite number: a counted point is never dropped.
        """
        y, mean, y_mask = np.asarray(y), np.asarray(mean), np.asarray(y_mask, dtype=bool)
        middle = mean if median is None else np.asarray(median)
        bands = np.empty((*y.shape, 0)) if quantiles is None else np.asarray(quantiles)
        _same_shape(y, y_mask=y_mask, mean=mean, median=middle)
        if bands.shape != (*y.shape, len(levels)):
            raise InputError(f"quantiles {bands.shape}: expected {(*y.shape, len(levels))}")
        empty = cls.zeros(y.shape[1], levels, floor, centre)
        if len(empty.floor) != y.shape[3]:
            raise InputError(
                f"floor: {len(empty.floor)} values, expected one for each of {y.shape[3]} metrics"
            )

        seen = _points(y_mask)
        target = _observed(y, seen, "y")
        error = target - _observed(mean, seen, "mean")
        miss = np.abs(target - _observed(middle, seen, "median"))
        spread = _points(np.broadcast_to(np.asarray(scale, np.float64), y.shape))
        level = np.where(seen, target - np.array(empty.centre)[:, None], 0)
        reaches = seen & (np.abs(target) >= np.array(empty.floor)[:, None])
        relative = miss / np.maximum(np.abs(target), np.array(empty.floor)[:, None])
        scores = replace(
            empty,
            n=seen.sum(-1),
            abs_error=miss.sum(-1),
            scaled_error=(miss / spread).sum(-1),
            squared_error=(error**2).sum(-1),
            y=level.sum(-1),
            y_squared=(level**2).sum(-1),
            y_abs=np.abs(target).sum(-1),
            ape=np.where(reaches, relative, 0).sum(-1),
            ape_n=reaches.sum(-1),
        )
        levels_of = [_observed(bands[..., i], seen, "quantiles") for i in range(len(levels))]
        return scores._with_quantiles(target, seen, levels_of)

    def _with_quantiles(self, target: Floats, seen: NDArray[np.bool_], quantiles: list[Floats]) -> Scores:
        """Fills the quantile parts from target, seen and each level's forecast, all [H, F, points]."""
        pinball, over, below = self.pinball.copy(), self.over.copy(), self.below.copy()
        for i, (level, quantile) in enumerate(zip(self.levels, quantiles, strict=True)):
            gap = target - quantile
            pinball[..., i] = np.maximum(level * gap, (level - 1) * gap).sum(-1)
            over[..., i] = np.maximum(-gap, 0).sum(-1)
            below[..., i] = (seen & (gap <= 0)).sum(-1)
        inside, interval_score = self.inside.copy(), self.interval_score.copy()
        for i, (coverage, low, high) in enumerate(central(self.levels)):
            outside = np.maximum(quantiles[low] - target, 0) + np.maximum(target - quantiles[high], 0)
            width = quantiles[high] - quantiles[low]
            inside[..., i] = (seen & (outside == 0)).sum(-1)
            interval_score[..., i] = (width + 2 / (1 - coverage) * outside).sum(-1)
        return replace(
            self, pinball=pinball, over=over, below=below, inside=inside, interval_score=interval_score
        )

    def __add__(self, other: Scores) -> Scores:
        """Both together. Raises InputError if they count different things."""
        mine, theirs = ((s.n.shape, *(getattr(s, name) for name in _PLAIN)) for s in (self, other))
        if mine != theirs:
            raise InputError(f"scores of (shape, {', '.join(_PLAIN)}) {theirs}: expected {mine}")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _ARRAYS})

    def pooled(self, steps: Sequence[int] | slice = slice(None)) -> Scores:
        """One step [1, F] that holds the chosen horizon steps together; all of them if not given."""
        pick = steps if isinstance(steps, slice) else list(steps)
        sums = {name: getattr(self, name)[pick].sum(axis=0, keepdims=True) for name in _ARRAYS}
        return replace(self, **sums)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; nothing is rounded."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return {name: list(getattr(self, name)) for name in _PLAIN} | arrays

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scores:
        """What `to_json` gave. Raises InputError if it is something else."""
        expected = {field.name for field in fields(cls)}
        if set(value) != expected:
            raise InputError(f"scores with fields {sorted(value)}: expected {sorted(expected)}")
        scores = cls.zeros(len(value["n"]), value["levels"], value["floor"], value["centre"])
        arrays: dict[str, Any] = {}
        for name in _ARRAYS:
            empty = getattr(scores, name)
            arrays[name] = np.array(value[name], dtype=empty.dtype)
            _same_shape(empty, **{name: arrays[name]})
        return replace(scores, **arrays)


_PLAIN = ("levels", "floor", "centre")
_ARRAYS = tuple(field.name for field in fields(Scores) if field.name not in _PLAIN)


def central(levels: Sequence[float]) -> list[tuple[float, int, int]]:
    """(nominal coverage, index of the lower level, of the upper) of the INTERVALS that the levels span."""
    at = {round(level, 6): i for i, level in enumerate(levels)}
    ends = [(c, at.get(round((1 - c) / 2, 6)), at.get(round((1 + c) / 2, 6))) for c in INTERVALS]
    return [(c, low, high) for c, low, high in ends if low is not None and high is not None]


# -- figures, each [H, F] ------------------------------------------------------------------------------------


def mae(scores: Scores) -> Floats:
    """Mean absolute error of the median forecast, in the target's units."""
    return ratio(scores.abs_error, scores.n)


def mse(scores: Scores) -> Floats:
    """Mean squared error of the mean forecast, in squared units."""
    return ratio(scores.squared_error, scores.n)


def rmse(scores: Scores) -> Floats:
    """Root of the mean squared error."""
    return np.sqrt(mse(scores))


def mape(scores: Scores) -> Floats:
    """Mean absolute percentage error as a fraction, over the targets that reach the floor."""
    return ratio(scores.ape, scores.ape_n)


def mape_share(scores: Scores) -> Floats:
    """The share of targets that the MAPE covers."""
    return ratio(scores.ape_n, scores.n)


def wape(scores: Scores) -> Floats:
    """Σ |error| ÷ Σ |y|, as a fraction."""
    return ratio(scores.abs_error, scores.y_abs)


def mase(scores: Scores, scale: ArrayLike) -> Floats:
    """MAE ÷ `scale` [F], the training part's mean absolute seasonal difference (Hyndman & Koehler 2006)."""
    return ratio(mae(scores), np.broadcast_to(np.asarray(scale, dtype=np.float64), scores.n.shape))


def scaled_mae(scores: Scores) -> Floats:
    """Mean of |error| ÷ the standard deviation of the training part."""
    return ratio(scores.scaled_error, scores.n)


def r2(scores: Scores) -> Floats:
    """1 − Σ error² ÷ Σ (y − ȳ)² with ȳ of the very targets that were counted; NaN if they are all alike."""
    total = scores.y_squared - ratio(scores.y**2, scores.n)
    # Of a constant target the difference leaves nothing but rounding.
    varies = total > 1e-12 * scores.y_squared
    return 1 - ratio(scores.squared_error, np.where(varies, total, 0))


def pinball(scores: Scores) -> Floats:
    """Pinball loss, the mean over targets and levels."""
    return ratio(scores.pinball.sum(-1), scores.n * len(scores.levels))


def calibration(scores: Scores) -> Floats:
    """[H, F, Q] observed one-sided coverage: the share of targets at or below each quantile."""
    return ratio(scores.below, np.broadcast_to(scores.n[..., None], scores.below.shape))


def under_provisioned(scores: Scores) -> Floats:
    """[H, F, Q] the share of targets above each quantile: how often it is too little to provision."""
    return 1 - calibration(scores)


def idle(scores: Scores) -> Floats:
    """[H, F, Q] mean of max(ŷ_q − y, 0) per target: what stays unused if each quantile is provisioned."""
    return ratio(scores.over, np.broadcast_to(scores.n[..., None], scores.over.shape))


def shortfall(scores: Scores) -> Floats:
    """[H, F, Q] mean of max(y − ŷ_q, 0) per target: what is missing if each quantile is provisioned."""
    levels = np.array(scores.levels)
    # The pinball loss is q · shortfall + (1 − q) · idle; rounding may leave a hair below zero.
    missing = np.maximum((scores.pinball - (1 - levels) * scores.over) / levels, 0)
    return ratio(missing, np.broadcast_to(scores.n[..., None], missing.shape))


def coverage(scores: Scores, nominal: float) -> Floats:
    """The share of targets inside the central interval; NaN where the levels do not span it."""
    for i, (level, _, _) in enumerate(central(scores.levels)):
        if level == nominal:
            return ratio(scores.inside[..., i], scores.n)
    return np.full(scores.n.shape, np.nan)


def wis(scores: Scores) -> Floats:
    """Weighted interval score of the median and the central intervals (Bracher et al. 2021, eq. 1).

    NaN where the levels hold no median.
    """
    if 0.5 not in scores.levels:
        return np.full(scores.n.shape, np.nan)
    pairs = central(scores.levels)
    halves = np.array([(1 - nominal) / 2 for nominal, _, _ in pairs])
    # Half the absolute error of the median is its pinball loss.
    total = scores.pinball[..., scores.levels.index(0.5)] + (scores.interval_score * halves).sum(-1)
    return ratio(total, scores.n * (len(pairs) + 0.5))


def figures(scores: Scores, mase_scale: ArrayLike) -> list[dict[str, float | None]]:
    """Every figure pooled over all horizon steps, one dict per metric, ready for JSON.

    `mase_scale` [F] is the training part's, in original units.
    """
    one = scores.pooled()
    table = {
        "mae": mae(one),
        "rmse": rmse(one),
        "mse": mse(one),
        "mape": mape(one),
        "mape_share": mape_share(one),
        "wape": wape(one),
        "mase": mase(one, mase_scale),
        "r2": r2(one),
        "scaled_mae": scaled_mae(one),
        "pinball": pinball(one),
        **{f"coverage_{nominal * 100:.0f}": coverage(one, nominal) for nominal in INTERVALS},
        "wis": wis(one),
    }
    return [
        {name: float(values[0, f]) if np.isfinite(values[0, f]) else None for name, values in table.items()}
        for f in range(one.n.shape[1])
    ]


# -- per origin ----------------------------------------------------------------------------------------------


def per_origin(
    y: ArrayLike,
    y_mask: ArrayLike,
    mean: ArrayLike,
    median: ArrayLike,
    quantiles: ArrayLike,
    levels: Sequence[float],
    scale: ArrayLike = 1.0,
) -> Floats:
    """[B, K, H, F] sums over the observed entities of each window, for comparisons and totals.

    K is ERROR Σ (y − mean), COUNT, ABSOLUTE Σ |y − median| ÷ `scale`, SQUARED Σ (y − mean)², PINBALL Σ of
    the mean over levels. Shapes as in `Scores.of`; whether targets and forecasts are finite is checked there.
    """
    y, seen = np.asarray(y, np.float64), np.asarray(y_mask, dtype=bool)
    error = y - np.asarray(mean)
    gap = y[..., None] - np.asarray(quantiles)
    loss = np.maximum(np.array(levels) * gap, (np.array(levels) - 1) * gap).mean(-1)
    parts = [error, np.ones_like(y), np.abs(y - np.asarray(median)) / np.asarray(scale), error**2, loss]
    return np.stack([np.where(seen, part, 0).sum(2) for part in parts], axis=1)


# -- per entity ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerEntity:
    """Scaled errors of each entity over the whole horizon: a few bad entities can hide in a pooled figure.

    N entities were counted so far: those of a group, then of several.
    """

    nodes: Counts
    """[N] their positions among all, rising."""
    n: Counts
    """[N, F] observed targets."""
    scaled_error: Floats
    """[N, F] Σ |y − median forecast| ÷ the standard deviation of the training part."""

    @classmethod
    def zeros(cls, entities: int, metrics: int) -> PerEntity:
        """Nothing counted yet of the first `entities`; with 0 the neutral element of `+`."""
        return cls._none(np.arange(entities), metrics)

    @classmethod
    def _none(cls, nodes: Counts, metrics: int) -> PerEntity:
        shape = (len(nodes), metrics)
        return cls(nodes, np.zeros(shape, np.int64), np.zeros(shape))

    @classmethod
    def of(
        cls, y: ArrayLike, y_mask: ArrayLike, median: ArrayLike, nodes: ArrayLike, scale: ArrayLike = 1.0
    ) -> PerEntity:
        """The state of one batch; shapes and errors as in `Scores.of`.

        `nodes` [N] has the entities' positions among all; those at −1 are unknown and not counted.
        """
        y, median, y_mask = np.asarray(y), np.asarray(median), np.asarray(y_mask, dtype=bool)
        _same_shape(y, y_mask=y_mask, median=median)
        spread = np.broadcast_to(np.asarray(scale, np.float64), y.shape)
        # [N, F, points]: the same reduction as in Scores, with entities in the place of steps.
        y, median, y_mask, spread = (array.swapaxes(1, 2) for array in (y, median, y_mask, spread))
        seen = _points(y_mask)
        error = np.abs(_observed(y, seen, "y") - _observed(median, seen, "median")) / _points(spread)
        nodes = np.asarray(nodes, np.int64)
        order = np.argsort(nodes, kind="stable")
        order = order[nodes[order] >= 0]
        return cls(nodes[order], seen.sum(-1)[order], error.sum(-1)[order])

    def __add__(self, other: PerEntity) -> PerEntity:
        """Both together, entity by entity."""
        total = PerEntity._none(np.union1d(self.nodes, other.nodes), self.n.shape[1])
        for part in (self, other):
            at = np.searchsorted(total.nodes, part.nodes)
            total.n[at] += part.n
            total.scaled_error[at] += part.scaled_error
        return total

    def scaled_mae(self) -> Floats:
        """[N, F] of each entity; NaN where nothing was observed."""
        return ratio(self.scaled_error, self.n)

    def median(self) -> Floats:
        """[F] the median entity's scaled MAE, of those with observed targets; NaN if there are none."""
        errors = self.scaled_mae()
        known = [column[np.isfinite(column)] for column in errors.T]
        return np.array([np.median(column) if column.size else np.nan for column in known])


# -- arrays --------------------------------------------------------------------------------------------------


def _points(array: NDArray[Any]) -> NDArray[Any]:
    """[B, H, N, F] → [H, F, B · N], contiguous, so that numpy sums each row pairwise and loses no digits."""
    _, horizon, _, metrics = array.shape
    return np.ascontiguousarray(array.transpose(1, 3, 0, 2)).reshape(horizon, metrics, -1)


def _observed(array: NDArray[Any], seen: NDArray[np.bool_], name: str) -> Floats:
    """The points as float64, zero where not observed."""
    points = np.where(seen, _points(array), 0).astype(np.float64)
    wrong = int((~np.isfinite(points)).sum())
    if wrong:
        raise InputError(f"{name}: not a finite number at {wrong} of {int(seen.sum())} observed targets")
    return points


def _same_shape(array: NDArray[Any], **others: NDArray[Any]) -> None:
    for name, other in others.items():
        if other.shape != array.shape:
            raise InputError(f"{name} {other.shape}: expected {array.shape}")


def ratio(sums: NDArray[Any], counts: NDArray[Any]) -> Floats:
    """Element-wise quotient; NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)
