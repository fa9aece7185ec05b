"""Time features: what the clock and the calendar say of a step, known for the future as well.

The clock's are waves of the day and the week in local time. The calendar's say which share of a step lies on
a holiday, or within an event that was announced: one feature for each country and for each name of an event.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import fsspec
import holidays
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor

from fleetcast.config import Options
from fleetcast.errors import InputError

_DAY, _WEEK = 86_400, 604_800
#: The first of January 1970 was a Thursday; weeks begin on Monday.
_MONDAY = 4 * _DAY
#: Cycles per period: two harmonics of the day, one of the week.
_CYCLES = ((_DAY, 1), (_DAY, 2), (_WEEK, 1))
#: Of the clock alone.
FEATURES = 2 * len(_CYCLES)
#: How far behind the telemetry's end the calendar is known [s]: live forecasts go on from there.
_AHEAD = 400 * _DAY


class Mark(Options):
    """Something of the calendar: one time feature."""

    name: str
    spans: tuple[tuple[int, int], ...]
    """When it is: from a Unix time until before another, in order."""


class Calendar(Options):
    """What is known of the past's and the future's days; part of a dataset."""

    timezone: str = "UTC"
    """In which days and weeks are counted."""
    marks: tuple[Mark, ...] = ()

    @property
    def features(self) -> int:
        """C, the number of time features."""
        return FEATURES + len(self.marks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the marks."""
        return tuple(mark.name for mark in self.marks)

    def within(self, first: int, last: int) -> list[tuple[str, int, int]]:
        """Name, start and end of all that is between two Unix times, cut off at them."""
        return [
            (mark.name, max(start, first), min(end, last))
            for mark in self.marks
            for start, end in mark.spans
            if start < last and end > first
        ]


def time_features(start: int, step: int, first: int, last: int, calendar: Calendar | None = None) -> Tensor:
    """[last − first, C] sine and cosine of the day and the week at steps `first` to `last`, and of each of
    the calendar's marks the share of the step that lies in it.

    `start` is the Unix time of step 0 and `step` the width of a step [s]. Angles are taken of whole seconds
    within the period, so no precision is lost to large times.
    """
    calendar = calendar or Calendar()
    times = start + step * np.arange(first, last, dtype=np.int64)
    seconds = _local(times, calendar.timezone) - _MONDAY
    angles = [2 * np.pi * cycles * (seconds % period) / period for period, cycles in _CYCLES]
    features = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    features += [_share(times, step, mark) for mark in calendar.marks]
    return torch.from_numpy(np.stack(features, axis=1).astype(np.float32))


def _local(times: NDArray[np.int64], timezone: str) -> NDArray[np.int64]:
    """Unix times → what a clock on the wall would say, as if it were UTC."""
    if timezone == "UTC":
        return times
    wall = pd.to_datetime(times, unit="s", utc=True).tz_convert(timezone).tz_localize(None)
    return wall.to_numpy().astype("datetime64[s]").astype(np.int64)


def _share(times: NDArray[np.int64], step: int, mark: Mark) -> NDArray[np.float64]:
    covered = np.zeros(len(times))
    for start, end in mark.spans:
        covered += np.clip(np.minimum(times + step, end) - np.maximum(times, start), 0, step)
    return np.minimum(covered / step, 1)


# -- what is asked for -------------------------------------------------------------------------------------


class Event(Options):
    """Something that is known in advance: a sale, a match, a migration. Those of one name are one feature."""

    name: str = Field(min_length=1)
    start: datetime
    """In the calendar's time zone if it has none of its own."""
    end: datetime | None = None
    """A day after the start if not given."""


class CalendarOptions(Options):
    """Holidays and events, which models see in the look-back and in the horizon."""

    timezone: str = "UTC"
    """The time zone in which days and weeks are counted, such as Europe/Berlin."""
    holidays: tuple[str, ...] = ()
    """Countries, or parts of them, whose public holidays count: DE, DE-BY, US-CA, …"""
    events: tuple[Event, ...] = ()
    """Events, each with name, start and end."""
    events_file: str | None = None
    """More of them: a csv with the columns name, start and end, local or `s3://…`."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"unknown time zone {name!r}, expected one such as Europe/Berlin") from error
        return name

    @field_validator("holidays")
    @classmethod
    def _known_countries(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        known = holidays.list_supported_countries()
        for code in codes:
            country, _, part = code.partition("-")
            if country not in known:
                raise ValueError(f"unknown country {country!r}, expected a code of two letters such as DE")
            if part and part not in known[country]:
                parts = ", ".join(known[country]) or "none"
                raise ValueError(f"unknown part {part!r} of {country}, expected one of {parts}")
        if len(set(codes)) < len(codes):
            raise ValueError("expected each country once")
        return codes

    @model_validator(mode="after")
    def _events_end(self) -> Self:
        for event in self.events:
            start, end = _span(event, self.timezone)
            if end <= start:
                raise ValueError(f"event {event.name}: end {event.end} must be after start {event.start}")
        return self

    def resolve(self, first: int, last: int) -> Calendar:
        """The calendar of a dataset between two Unix times, and of the year after it.

        Raises InputError if the file of events cannot be read.
        """
        last += _AHEAD
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for code in self.holidays:
            found[f"holiday {code}"] = _holidays(code, first, last, self.timezone)
        for event in (*self.events, *self.listed()):
            found[event.name].append(_span(event, self.timezone))
        marks = (
            Mark(name=name, spans=tuple(sorted((a, b) for a, b in spans if a < last and b > first)))
            for name, spans in found.items()
        )
        return Calendar(timezone=self.timezone, marks=tuple(marks))

    def listed(self) -> list[Event]:
        """The events of the file, if there is one. Raises InputError if it cannot be read."""
        if self.events_file is None:
            return []
        try:
            with fsspec.open(self.events_file, "rt", newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"--events-file {self.events_file}: cannot be read ({error})") from error
        try:
            events = [Event(**{key: value for key, value in row.items() if value}) for row in rows]
            CalendarOptions(timezone=self.timezone, events=tuple(events))
        except (ValidationError, TypeError) as error:
            why = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
            place = ".".join(map(str, why.get("loc", ())))
            raise InputError(
                f"--events-file {self.events_file}: expected rows of name, start and end, but {place} "
                f"{why['msg']}, got {why.get('input')!r}"
            ) from error
        return events


def _span(event: Event, timezone: str) -> tuple[int, int]:
    zone = ZoneInfo(timezone)
    start = event.start if event.start.tzinfo else event.start.replace(tzinfo=zone)
    end = start + timedelta(days=1) if event.end is None else event.end
    end = end if end.tzinfo else end.replace(tzinfo=zone)
    return int(start.timestamp()), int(end.timestamp())


def _holidays(code: str, first: int, last: int, timezone: str) -> list[tuple[int, int]]:
    country, _, part = code.partition("-")
    years = range(datetime.fromtimestamp(first, UTC).year, datetime.fromtimestamp(last, UTC).year + 1)
    days: list[date] = sorted(holidays.country_holidays(country, subdiv=part or None, years=years))
    zone = ZoneInfo(timezone)

    def midnight(day: date) -> int:
        return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())

    return [(midnight(day), midnight(day + timedelta(days=1))) for day in days]
