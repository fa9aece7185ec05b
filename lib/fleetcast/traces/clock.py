"""Columns of times, however they are written, as milliseconds since 1970, UTC; and which one to believe."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import polars as pl

from fleetcast.errors import InputError

log = logging.getLogger("fleetcast")

Unit = Literal["s", "ms", "us", "ns", "step"]

_PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
#: Unix times of more than this many milliseconds (the year 2200), or less than 0, are no times.
_LATEST = 7_258_118_400_000
#: Clocks of a file that differ by less agree [s]; or by half the gap between its times.
_AGREE = 60
#: A file is out of all others' time if it is so many times further away than these are from each other.
_ALONE = 100
_DAY = 86_400
#: As Go prints a time: behind it the seconds since the process began, before those the zone and its name.
_PROCESS = r" m=[+-][0-9.]+$"
_ZONE = r" ([+-]\d\d:?\d\d)( [A-Z]{3,5}| [+-]\d{2,4})?$"
#: Whole numbers that rise by 1 and are below this (95 years of 5 minutes) count steps, not seconds.
_LARGEST_STEP = 10**7


@dataclass(frozen=True)
class Clock:
    """What a column's times mean."""

    unit: Unit | None
    """Of numbers; None where the column holds dates or texts, ISO 8601 or as Go prints them."""
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
        texts = column.str.strip_chars().str.replace(_PROCESS, "").str.replace(_ZONE, "$1")
        texts = texts.str.strip_suffix(" UTC")
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


@dataclass(frozen=True)
class Times:
    """The times of a file."""

    column: str
    clock: Clock
    middle: float
    """The median of some of them [Unix s]."""
    gap: float
    """Width of a slice of time that is theirs: the median distance between some of them [s]; 0 of one."""
    off: tuple[dict[str, Any], ...]
    """The file's other columns that are off: `file`, `column`, `offset` [s] from the one that is used."""


def read_times(
    option: str,
    files: Mapping[str, pl.DataFrame],
    unit: str,
    start: int,
    step: int,
    others: Sequence[float] = (),
) -> dict[str, Times]:
    """File → its times, of one of the columns of which some rows are given, in the order of preference.

    Where columns of a file say other times, the one is used that is nearest to the times of the other files,
    and to `others` [Unix s]; the first, if they are equally near. Raises InputError if a file has no times,
    or if it is far from all the others and has no other column.
    """
    clocks = _clocks(option, files, unit, start, step)
    read = {
        file: {name: clocks[file, name].milliseconds(rows[name]) for name in rows.columns}
        for file, rows in files.items()
    }
    middles: dict[str, dict[str, float]] = {}
    for file, rows in files.items():
        found = {name: of.median() for name, of in read[file].items()}
        middles[file] = {name: float(of) / 1000 for name, of in found.items() if of is not None}  # type: ignore[arg-type]
        if not middles[file]:
            given = next(of for column in rows if len(of := column.drop_nulls()))
            raise InputError(
                f"--{option} {given.name}: expected times between 1970 and 2200 (ISO 8601, or numbers as "
                f"--time-unit says), got {given[0]!r} and others"
            )
    return {file: _believed(option, file, read[file], clocks, middles, others) for file in files}


def _believed(
    option: str,
    file: str,
    read: Mapping[str, pl.Series],
    clocks: Mapping[tuple[str, str], Clock],
    middles: Mapping[str, Mapping[str, float]],
    others: Sequence[float],
) -> Times:
    """Of the columns of a file the one to believe."""
    mine = middles[file]
    first = next(iter(mine))
    gap = median_gap(read[first].drop_nulls().to_numpy()) or 0.0
    agree = max(_AGREE, gap / 2)
    rest = [of for name, of in middles.items() if name != file] + [{"": at} for at in others]

    def distance(name: str) -> float:
        """From the other files: the median over them of that from the same column, or from their nearest."""
        if not rest:
            return 0.0
        near = [[of[name]] if name in of else of.values() for of in rest]
        return float(np.median([min(abs(at - mine[name]) for at in of) for of in near]))

    used, best = first, distance(first)
    for name in mine:
        if best - distance(name) > agree:
            used, best = name, distance(name)
    if len(rest) > 1:
        every = [at for of in rest for at in of.values()]
        apart = max(_DAY, max(every) - min(every))
        if best > _ALONE * apart:
            raise InputError(
                f"--{option} {used}: the times of {file} are some {best:,.0f} s from those of all others, "
                "so its clock is wrong; expected a further column of times to choose from"
            )
    off = []
    for name in mine:
        offset = (read[name] - read[used]).median()
        if name != used and offset is not None and abs(float(offset)) / 1000 > agree:  # type: ignore[arg-type]
            off.append({"file": file, "column": name, "offset": round(float(offset) / 1000), "used": used})  # type: ignore[arg-type]
            log.warning(
                "tabular: %s: the clock of %s is off by %+d s, %s is used",
                file,
                name,
                off[-1]["offset"],
                used,
            )
    return Times(used, clocks[file, used], mine[used], gap, tuple(off))


def _clocks(
    option: str, files: Mapping[str, pl.DataFrame], unit: str, start: int, step: int
) -> dict[tuple[str, str], Clock]:
    """(file, column) → its clock. Numbers of the same column mean the same in every file."""
    numbers: dict[tuple[str, str], np.ndarray] = {}
    dates = []
    for file, rows in files.items():
        for column in rows:
            found = _numbers(option, column.drop_nulls())
            if found is None:
                if unit != "auto":
                    raise InputError(
                        f"--{option} {column.name}: expected numbers for --time-unit {unit}, got "
                        f"{column.drop_nulls()[0]!r}"
                    )
                dates.append((file, column.name))
            else:
                numbers[file, column.name] = found
    together = defaultdict(list)
    for (_, name), found in numbers.items():
        together[name].append(found)
    units: dict[str, Any] = {
        name: _unit(np.concatenate(found)) if unit == "auto" else unit for name, found in together.items()
    }
    if unit == "auto":
        for name, of in units.items():
            log.info(
                "tabular: --%s %s is taken for %s",
                option,
                name,
                "steps" if of == "step" else f"Unix time in {of}",
            )
    return dict.fromkeys(dates, Clock(None, start, step)) | {
        key: Clock(units[key[1]], start, step) for key in numbers
    }


def _numbers(option: str, values: pl.Series) -> np.ndarray | None:
    """The numbers of a column, or None if it holds dates. Raises InputError if they are neither."""
    if values.dtype.is_temporal() and not isinstance(values.dtype, pl.Duration | pl.Time):
        return None
    if not (values.dtype.is_numeric() or values.dtype in (pl.String, pl.Null)):
        raise InputError(f"--{option} {values.name}: expected times, got {values.dtype}")
    numbers = values.cast(pl.Float64, strict=False).drop_nulls()
    if values.dtype == pl.String and 2 * len(numbers) < len(values):
        return None
    return numbers.to_numpy()


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
