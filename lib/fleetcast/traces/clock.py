"""Columns of times, however they are written, as milliseconds since 1970, UTC."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import polars as pl

from fleetcast.errors import InputError

log = logging.getLogger("fleetcast")

Unit = Literal["s", "ms", "us", "ns", "step"]

_PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
#: Unix times of more than this many milliseconds (the year 2200), or less than 0, are no times.
_LATEST = 7_258_118_400_000
#: Whole numbers that rise by 1 and are below this (95 years of 5 minutes) count steps, not seconds.
_LARGEST_STEP = 10**7


@dataclass(frozen=True)
class Clock:
    """What a column's times mean."""

    unit: Unit | None
    """Of numbers; None where the column holds dates or ISO 8601 texts."""
    start: int
    """Unix seconds of step 0."""
    step: int
    """Width of the steps that step numbers count [s]."""

    def milliseconds(self, column: pl.Series) -> pl.Series:
        """Int64; null where a value is null, is no time, or is not between 1970 and 2200."""
        if self.unit is None:
            times = _dates(column)
        else:
            per = 1000 * self.step if self.unit == "step" else 1000 / _PER_SECOND[self.unit]
            first = 1000 * self.start if self.unit == "step" else 0
            times = _scaled(column, per, first)
        return times.set(~times.is_between(0, _LATEST), None)


def _dates(column: pl.Series) -> pl.Series:
    """Naive times are UTC."""
    if column.dtype == pl.String:
        texts = column.str.strip_chars().str.strip_suffix(" UTC")
        parsed = pd.to_datetime(
            pd.Series(texts.to_list(), dtype=object), format="ISO8601", utc=True, errors="coerce"
        )
        column = pl.Series(column.name, parsed.dt.tz_localize(None).astype("datetime64[ms]").to_numpy())
    elif isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("ms")).dt.epoch("ms")


def _scaled(column: pl.Series, per: float, first: int) -> pl.Series:
    """Numbers times `per` plus `first`, whole ones exactly: float64 does not hold nanoseconds."""
    if column.dtype == pl.String:
        column = column.str.strip_chars()
    real = column.cast(pl.Float64, strict=False)
    real = real.set(~(real * per + first).is_between(0, _LATEST), None)
    by_float = (real * per + first).floor().cast(pl.Int64)
    if column.dtype.is_float():
        return by_float
    whole = column.cast(pl.Int64, strict=False).set(real.is_null(), None)
    exact = whole * int(per) if per >= 1 else whole // round(1 / per)
    return (exact + first).fill_null(by_float) if exact.null_count() else exact + first


def read_clock(option: str, column: pl.Series, unit: str, start: int, step: int) -> Clock:
    """The clock of a column, of which some values are given. Raises InputError if they are no times."""
    values = column.drop_nulls()
    if values.dtype.is_temporal() and not isinstance(values.dtype, pl.Duration | pl.Time):
        numbers = None
    elif values.dtype.is_numeric() or values.dtype == pl.String:
        numbers = values.cast(pl.Float64, strict=False).drop_nulls()
        if values.dtype == pl.String and 2 * len(numbers) < len(values):
            numbers = None
    else:
        raise InputError(f"--{option} {column.name}: expected times, got {values.dtype}")
    if unit != "auto" and numbers is None:
        raise InputError(
            f"--{option} {column.name}: expected numbers for --time-unit {unit}, got {values[0]!r}"
        )
    if numbers is None:
        clock = Clock(None, start, step)
    else:
        clock = Clock(_unit(numbers.to_numpy()) if unit == "auto" else unit, start, step)  # type: ignore[arg-type]
    if clock.milliseconds(values).null_count() == len(values):
        raise InputError(
            f"--{option} {column.name}: expected times between 1970 and 2200 (ISO 8601, or numbers as "
            f"--time-unit says), got {values[0]!r} and others"
        )
    return clock


def _unit(numbers: np.ndarray) -> Unit:
    """By how they rise, and by their magnitude: 10⁹ s, 10¹² ms, 10¹⁵ µs and 10¹⁸ ns are all about 2001."""
    distinct = np.unique(numbers[np.isfinite(numbers)])
    counted = len(distinct) > 1 and distinct[0] >= 0 and distinct[-1] < _LARGEST_STEP
    if counted and np.median(np.diff(distinct)) == 1:
        return "step"
    largest = np.abs(np.median(distinct)) if len(distinct) else 0
    for unit in ("s", "ms", "us"):
        if largest < 100e9 * _PER_SECOND[unit]:
            return unit
    return "ns"


def median_gap(milliseconds: np.ndarray) -> float | None:
    """Median distance between distinct times [s]; None if there is only one."""
    gaps = np.diff(np.unique(milliseconds))
    return float(np.median(gaps)) / 1000 if len(gaps) else None
