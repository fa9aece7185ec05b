"""Levels that belong together: what the level below says of a level, and one forecast that both agree on.

    parent = scale · A children + rest + noise

A adds up the children of a parent, or averages them where its metric is their mean. `scale` brings the two
levels' units together and is fitted; `rest` is what a parent carries besides its children, as the work on a
machine that no container does. Services are made of their containers: their scale is 1, and there is no
rest. With errors of the children's forecasts Σ_c, of the parents' own Σ_p and of the rest Σ_r the best
forecast of both is

    c' = c + Σ_c Bᵀ s,    rest' = rest + Σ_r s,    p' = B c' + rest',    B = scale · A
    s = (B Σ_c Bᵀ + Σ_r + Σ_p)⁻¹ (p − B c − rest)

(minimum-trace reconciliation, Wickramasuriya, Athanasopoulos & Hyndman 2019, J. Am. Stat. Assoc. 114, of
levels that are forecast each on its own). The Σ are diagonal and come from the forecasts' own quantiles;
`below` and `above` correct their size by the errors on the validation part, `below` also for children that
err together.

Shapes: L look-back, H horizon steps, C children, P parents, of one or two levels one after the other.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import cg

from fleetcast.schemas import adds_up

Floats = NDArray[np.float64]

#: The level that the others are made of.
CHILD = "container"
PARENTS = ("service", "machine")
#: A parent is as its children say where at least this share of them was observed.
_OBSERVED = 0.5
#: No forecast is more certain than this share of its level.
_LEAST = 1e-3


@dataclass(frozen=True)
class Side:
    """Forecasts of some entities of a level from one origin, in original units; NaN where there is none."""

    names: tuple[str, ...]
    past: Floats
    """[L, N] observed before the origin."""
    mean: Floats
    """[H, N]."""
    spread: Floats
    """[H, N] the standard deviation of a normal distribution with the forecast's 90 % interval."""
    y: Floats
    """[H, N] what came."""

    def __add__(self, other: Side) -> Side:
        """The entities of both."""
        both = [
            np.concatenate([getattr(one, part) for one in (self, other)], axis=1)
            for part in ("past", "mean", "spread", "y")
        ]
        return Side(self.names + other.names, *both)


@dataclass(frozen=True)
class Links:
    """Which children are part of which parents."""

    weights: sparse.csr_array
    """[P, C] a child's share in its parent's sum."""
    averaged: NDArray[np.bool_]
    """[P] whether a parent is the mean of its children."""
    whole: NDArray[np.bool_]
    """[P] whether a parent is made of its children alone."""

    @classmethod
    def of(
        cls,
        entities: pl.DataFrame,
        children: tuple[str, ...],
        parents: dict[str, tuple[str, ...]],
        metric: str,
    ) -> Links:
        """By the store's `entities`. A container counts on its machine by its capacity, where both have one:
        fractions of a capacity add up so."""
        capacity = f"{metric}_capacity" if f"{metric}_capacity" in entities.columns else None
        known = entities.filter((pl.col("kind") == CHILD) & pl.col("entity").is_in(children)).unique("entity")
        column = {name: place for place, name in enumerate(children)}
        rows, columns, weights = list[int](), list[int](), list[float]()
        averaged, whole = list[bool](), list[bool]()
        first = 0
        for level, names in parents.items():
            row = {name: first + place for place, name in enumerate(names)}
            own = "service" if level == "service" else "parent"
            found = known.drop_nulls(own).filter(pl.col(own).is_in(names)).sort("entity")
            share = pl.lit(1.0)
            if level == "machine" and capacity is not None:
                machines = entities.filter(pl.col("kind") == "machine").select(
                    parent="entity", whole=capacity
                )
                found = found.join(machines.unique("parent"), on="parent", how="left", maintain_order="left")
                share = (pl.col(capacity) / pl.col("whole")).fill_null(0).cast(pl.Float64)
                if not found.select((share > 0).any()).item():
                    share = pl.lit(1.0)  # nobody has a capacity: the scale alone brings them together
            for name, parent, weight in found.select("entity", own, share.alias("share")).iter_rows():
                rows.append(row[parent])
                columns.append(column[name])
                weights.append(weight)
            averaged += [level == "service" and not adds_up(metric)] * len(names)
            whole += [level == "service"] * len(names)
            first += len(names)
        shape = (first, len(children))
        return cls(
            sparse.coo_array((weights, (rows, columns)), shape).tocsr(),
            np.array(averaged, bool),
            np.array(whole, bool),
        )

    def sums(self, values: Floats) -> Floats:
        """[T, C] → [T, P] by the children that were observed, NaN where too few of a parent's were."""
        seen = np.isfinite(values)
        part = (self.weights != 0).astype(np.float64)
        count, most = (part @ seen.T.astype(np.float64)).T, part @ seen.any(0).astype(np.float64)
        total = (self.weights @ np.where(seen, values, 0).T).T
        total = np.where(self.averaged, total / np.maximum(count, 1), total)
        return np.where((count >= _OBSERVED * most) & (most > 0), total, np.nan)

    def matrix(self, present: NDArray[np.bool_]) -> sparse.csr_array:
        """[P, C] A of the children that are forecast."""
        found = self.weights @ sparse.diags_array(present.astype(np.float64))
        count = (found != 0).sum(1)
        return sparse.csr_array(
            sparse.diags_array(np.where(self.averaged, 1 / np.maximum(count, 1), 1)) @ found
        )


@dataclass(frozen=True)
class Family:
    """Children and parents of one metric at one origin."""

    children: Side
    parents: Side
    level: NDArray[np.int64]
    """[P] which level a parent is of."""
    links: Links

    def moments(self) -> Floats:
        """[levels, 2] Σ dx dy and Σ dx² of the past of parents (y) and their children's sums (x), each about
        its own mean: sums over origins give the scale."""
        x, y = self.links.sums(self.children.past), self.parents.past
        both = np.isfinite(x) & np.isfinite(y)
        x, y = (np.where(both, part, np.nan) for part in (x, y))
        dx, dy = x - _mean(x), y - _mean(y)
        found = np.zeros((int(self.level.max(initial=-1)) + 1, 2))
        for level in range(len(found)):
            at = self.level == level
            found[level] = np.nansum(dx[:, at] * dy[:, at]), np.nansum(dx[:, at] ** 2)
        return found

    def below(self, scale: Floats) -> Below:
        """What the children say of their parents, with a scale for each level."""
        factor, whole = scale[self.level], self.links.whole
        beside = self.parents.past - factor * self.links.sums(self.children.past)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a parent that was never observed
            rest = np.where(whole, 0, np.nanmean(beside, 0))
            noise = np.where(whole, 0, np.nanvar(beside, 0))
        present = known(self.children.mean)
        links = self.links.matrix(present)
        matrix = sparse.csr_array(sparse.diags_array(factor) @ links)
        told = (matrix @ np.where(present, self.children.mean, 0).T).T + rest
        return Below(matrix, rest, noise, np.where((links != 0).sum(1) > 0, told, np.nan))


@dataclass(frozen=True)
class Below:
    """What the level below says of parents."""

    matrix: sparse.csr_array
    """[P, C] B."""
    rest: Floats
    """[P] mean over the look-back of what is besides the children."""
    noise: Floats
    """[P] its variance."""
    mean: Floats
    """[H, P] B c + rest; NaN where there is no child, or no past."""

    def variance(self, spread: Floats) -> Floats:
        """[H, P] of `mean`, by the children's spread [H, C], if all err each on its own."""
        squares = self.matrix.power(2)
        return (squares @ np.nan_to_num(spread**2).T).T + self.noise


@dataclass(frozen=True)
class Fit:
    """What the validation part says of two levels and of one metric."""

    scale: Floats
    """Of each level of parents."""
    below: float
    """By how much the squared errors of sums are larger than their variance says."""
    above: float
    """The same of the parents' own forecasts."""


def scale_of(moments: Floats, levels: tuple[str, ...]) -> Floats:
    """The scale of each level from the sum of `Family.moments`: 1 of services, else least squares, 0 where
    the level below says nothing."""
    fitted = np.maximum(moments[:, 0] / np.maximum(moments[:, 1], 1e-30), 0)
    return np.where(np.array(levels) == "service", 1.0, fitted)


def errors(family: Family, scale: Floats) -> Floats:
    """[4] squared errors and variances of the sums and of the parents' own forecasts, for `fit_of`."""
    below = family.below(scale)
    y, own, spread = family.parents.y, family.parents.mean, family.parents.spread
    variance = below.variance(family.children.spread)
    seen = np.isfinite(y) & np.isfinite(below.mean) & np.isfinite(own)
    parts = ((y - below.mean) ** 2, variance, (y - own) ** 2, spread**2)
    return np.array([np.where(seen, part, 0).sum() for part in parts])


def fit_of(scale: Floats, sums: Floats) -> Fit:
    """From the sums of `errors` over the validation part's origins."""
    of_below, below, of_above, above = np.maximum(sums, 1e-12)
    return Fit(scale, float(of_below / below), float(of_above / above))


@dataclass(frozen=True)
class Reconciled:
    """One forecast of both levels."""

    children: Floats
    """[H, C]."""
    parents: Floats
    """[H, P]; of parents without children as it was."""
    below: Floats
    """[H, P] what the children's own forecasts add up to; NaN where there are none."""


def reconcile(family: Family, fit: Fit, bounds: tuple[float, float]) -> Reconciled:
    """Minimum trace. Forecasts stay within `bounds`; where that cuts a child, its parent follows."""
    children, parents, below = family.children, family.parents, family.below(fit.scale)
    usable = known(below.mean) & known(parents.mean)
    matrix = sparse.csr_array(sparse.diags_array(usable.astype(np.float64)) @ below.matrix)
    alone = bool(((matrix != 0).sum(0) <= 1).all())  # no child has two parents: the inverse is a quotient
    gap = np.where(usable, parents.mean - below.mean, 0)
    least = _LEAST * np.abs(np.nan_to_num(parents.mean)) + 1e-12
    noise = np.where(usable, fit.below * below.noise, 0)
    above = np.where(usable, fit.above * np.maximum(parents.spread, least) ** 2 + noise, 1)
    found = children.mean.copy()
    rest = np.tile(np.where(usable, below.rest, 0), (len(found), 1))
    for h in range(len(found)):
        variance = fit.below * np.nan_to_num(np.maximum(children.spread[h], 1e-9)) ** 2
        spread = matrix @ sparse.diags_array(variance)
        whole = sparse.csr_array(spread @ matrix.T + sparse.diags_array(above[h]))
        diagonal = whole.diagonal()
        if alone:
            solved = gap[h] / diagonal
        else:
            solved, left = cg(whole, gap[h], rtol=1e-8, maxiter=500, M=sparse.diags_array(1 / diagonal))
            if left:
                raise ArithmeticError(f"reconciliation has not converged at step {h} of the horizon")
        found[h] += spread.T @ solved
        rest[h] += noise * solved
    found = np.clip(found, *bounds)
    told = (matrix @ np.nan_to_num(found).T).T + rest
    return Reconciled(found, np.where(usable, np.clip(told, *bounds), parents.mean), below.mean)


def known(values: Floats) -> NDArray[np.bool_]:
    """[T, N] → [N] whether there is a value at every time."""
    return np.asarray(np.isfinite(values).all(0), np.bool_)


def _mean(values: Floats) -> Floats:
    """Over time, of what was observed; NaN where nothing was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, 0), np.float64)
