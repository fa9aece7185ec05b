"""The same numbers for Prometheus and Grafana.

`/metrics` has what is known now, to be scraped: samples may not lie in the future there. `query` and
`query_range` answer as Prometheus does, future included, so a panel from now-1d to now+1d draws the forecast.

    fleetcast_forecast{entity, metric, quantile}      fleetcast_forecast{entity, metric, stat="mean"}
    fleetcast_observed{entity, metric}
    fleetcast_total{metric, quantile}                 fleetcast_total{metric, stat="mean"}
    fleetcast_total_observed{metric}

Of PromQL a selector with matchers is understood, and a number, or a sum of two, by which Grafana tests a data
source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fleetcast.errors import InputError
from fleetcast.schemas import FRACTIONS, QUANTILES
from fleetcast.serving import answers
from fleetcast.serving.snapshot import MEAN, Snapshot, column, now

NAMES = ("fleetcast_forecast", "fleetcast_observed", "fleetcast_total", "fleetcast_total_observed")
LABELS = ("__name__", "entity", "metric", "quantile", "stat")
#: As Prometheus's own.
MOST_POINTS = 11_000
MOST_SERIES = 1_000
_MOST_TEXT = 10_000
#: Gauges of the total so many hours ahead, and those of the highest peaks and the nearest limits.
_AHEAD = (1, 3, 6, 12, 24)
_SHOWN = 10
_LIMIT, _CAUTIOUS = 0.8, 0.95

_SELECTOR = re.compile(r"\s*([a-zA-Z_:][\w:]*)?\s*(?:\{(.*)\})?\s*", re.S)
_MATCHER = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"\s*(,|$)', re.S)
_NUMBERS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:\+\s*(\d+(?:\.\d+)?))?\s*")


@dataclass(frozen=True)
class Matcher:
    """One condition on a label."""

    label: str
    operator: str
    value: str

    def keeps(self, values: pl.Series) -> pl.Series:
        """Which of some values of the label it lets through. Raises InputError for a wrong expression."""
        if self.operator in ("=", "!="):
            found = values == self.value
        else:
            try:  # of Rust: its time is linear in the text, whatever the expression
                found = values.str.contains(f"^(?s:{self.value})$")
            except pl.exceptions.ComputeError as error:
                raise InputError(f"query: {self.value!r} is not a regular expression") from error
        return ~found if self.operator.startswith("!") else found


def parse(query: str) -> tuple[Matcher, ...] | float:
    """A selector's matchers, or the value of a number. Raises InputError for anything else."""
    if len(query) > _MOST_TEXT:
        raise InputError(f"query: {len(query)} characters, expected at most {_MOST_TEXT}")
    numbers = _NUMBERS.fullmatch(query)
    if numbers:
        return float(numbers[1]) + float(numbers[2] or 0)
    found = _SELECTOR.fullmatch(query)
    if not found or not (found[1] or found[2]):
        raise InputError(
            'query: expected a selector such as fleetcast_forecast{entity="m_1",quantile="0.95"}, '
            "functions and operators are not supported"
        )
    matchers = [Matcher("__name__", "=", found[1])] if found[1] else []
    rest, at = found[2] or "", 0
    while at < len(rest) and rest[at:].strip():
        one = _MATCHER.match(rest, at)
        if not one:
            raise InputError(f'query: expected a matcher such as metric="cpu" at {rest[at : at + 20]!r}')
        matchers.append(Matcher(one[1], one[2], re.sub(r"\\(.)", r"\1", one[3])))
        at = one.end()
    return tuple(matchers)


def _choose(names: Iterable[str], matchers: Iterable[Matcher], label: str) -> list[str]:
    """The values of a label that its matchers let through."""
    values = pl.Series(list(names), dtype=pl.String)
    for matcher in matchers:
        if matcher.label == label:
            values = values.filter(matcher.keeps(values))
    return values.to_list()


@dataclass(frozen=True)
class Line:
    """One time series: its labels, the start of each of its steps, and values; NaN where there is none."""

    labels: Mapping[str, str]
    seconds: NDArray[np.int64]
    values: NDArray[Any]

    def at(self, times: NDArray[np.float64], step: int) -> NDArray[np.float64]:
        """The value of the step that each time lies in; NaN where there is none."""
        if not len(self.seconds):
            return np.full(len(times), np.nan)
        place = np.floor((times - self.seconds[0]) / step)
        inside = (place >= 0) & (place < len(self.seconds))
        values = np.asarray(self.values, np.float64)[np.where(inside, place, 0).astype(int)]
        return np.where(inside, values, np.nan)


def lines(snapshot: Snapshot, matchers: tuple[Matcher, ...]) -> list[Line]:
    """The series that a selector chooses. Raises InputError if they are too many."""
    chosen: list[dict[str, str]] = []
    for matcher in matchers:
        if matcher.label not in LABELS and not matcher.keeps(pl.Series([""])).item():
            return []  # an unknown label is empty
    metrics = _choose(snapshot.metrics, matchers, "metric")
    for name in _choose(NAMES, matchers, "__name__"):
        with_entities = name in ("fleetcast_forecast", "fleetcast_observed")
        entities = _choose(snapshot.entities if with_entities else [""], matchers, "entity")
        stats = [("", "")]
        if not name.endswith("observed"):
            stats = [("", f"{q:g}") for q in QUANTILES] + [("mean", "")]
        stats = [
            (stat, quantile)
            for stat, quantile in stats
            if _choose([stat], matchers, "stat") and _choose([quantile], matchers, "quantile")
        ]
        if len(entities) * len(metrics) * len(stats) + len(chosen) > MOST_SERIES:
            raise InputError(f"query: chooses more than {MOST_SERIES} series, name entities or quantiles")
        for entity in entities:
            for metric in metrics:
                for stat, quantile in stats:
                    labels = {"__name__": name, "entity": entity, "metric": metric}
                    labels |= {"quantile": quantile, "stat": stat}
                    chosen.append({key: value for key, value in labels.items() if value})
    return [_line(snapshot, labels) for labels in chosen]


def _line(snapshot: Snapshot, labels: dict[str, str]) -> Line:
    name, metric = labels["__name__"], labels["metric"]
    f = snapshot.metric(metric)
    place = column(float(labels["quantile"])) if "quantile" in labels else MEAN
    if name == "fleetcast_forecast":
        return Line(labels, snapshot.seconds, snapshot.values[snapshot.place(labels["entity"]), f, :, place])
    if name == "fleetcast_total":
        return Line(labels, snapshot.seconds, snapshot.total(metric, None)[0][:, place])
    if name == "fleetcast_observed":
        times, values = snapshot.history(labels["entity"])
        return Line(labels, times.astype(np.int64), values[:, f])
    past = np.array(
        [np.nan if value is None else value for value in snapshot.overview["total"][metric]["history"]]
    )
    seconds = int(snapshot.issued.timestamp()) - snapshot.step * np.arange(len(past), 0, -1)
    return Line(labels, seconds, past)


def query(snapshot: Snapshot, text: str, time: float | None, clock: str) -> dict[str, Any]:
    """`data` of an instant query."""
    moment = now(clock, snapshot).timestamp() if time is None else time
    found = parse(text)
    if isinstance(found, float):
        return {"resultType": "scalar", "result": [moment, f"{found:g}"]}
    result = []
    for line in lines(snapshot, found):
        (value,) = line.at(np.array([moment]), snapshot.step)
        if np.isfinite(value):
            result.append({"metric": line.labels, "value": [moment, f"{value:.7g}"]})
    return {"resultType": "vector", "result": result}


def query_range(snapshot: Snapshot, text: str, start: float, end: float, step: float) -> dict[str, Any]:
    """`data` of a range query. Raises InputError for too many points."""
    if end < start or step <= 0:
        raise InputError(f"start, end, step: {start:g}, {end:g}, {step:g}, expected a rising range")
    points = int((end - start) // step) + 1
    if points > MOST_POINTS:
        raise InputError(f"step: {points} points, expected at most {MOST_POINTS} for each series")
    times = np.asarray(start + step * np.arange(points), np.float64)
    found = parse(text)
    if isinstance(found, float):
        same = [[float(t), f"{found:g}"] for t in times]
        return {"resultType": "matrix", "result": [{"metric": {}, "values": same}]}
    result = []
    for line in lines(snapshot, found):
        values = line.at(times, snapshot.step)
        seen = np.isfinite(values)
        if seen.any():
            pairs = zip(times[seen].tolist(), values[seen].tolist(), strict=True)
            result.append({"metric": line.labels, "values": [[t, f"{v:.7g}"] for t, v in pairs]})
    return {"resultType": "matrix", "result": result}


def label_values(snapshot: Snapshot, label: str) -> list[str]:
    """Every value of a label."""
    known = {
        "__name__": NAMES,
        "entity": snapshot.entities,
        "metric": snapshot.metrics,
        "quantile": tuple(f"{q:g}" for q in QUANTILES),
        "stat": ("mean",),
    }
    return sorted(known.get(label, ()))


def seconds(value: str, name: str) -> float:
    """Unix seconds or RFC 3339 → Unix seconds. Raises InputError."""
    try:
        found = float(value)
    except ValueError:
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00").replace(" ", "+"))
        except ValueError as error:
            raise InputError(f"{name}: {value!r}, expected Unix seconds or RFC 3339") from error
        found = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not -1e11 < found < 1e11:  # nor for nan
        raise InputError(f"{name}: {value!r}, expected a time")
    return found


def duration(value: str, name: str) -> float:
    """`15`, `15s`, `5m`, `1h` or `1d` → seconds. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)?", value)
    if not found:
        raise InputError(f"{name}: {value!r}, expected a duration such as 15, 30s or 5m")
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    return float(found[1]) * units[found[2] or "s"]


class Gauges(Collector):
    """What is known now, in the form that Prometheus scrapes; a stale forecast has no figures of load."""

    def __init__(self, snapshot: Snapshot | None, refused: bool, clock: str) -> None:
        self.snapshot, self.refused, self.clock = snapshot, refused, clock

    def collect(self) -> Iterator[Metric]:
        """Every gauge."""
        yield _gauge("refused", "1 if a newer forecast cannot be used", {(): float(self.refused)})
        s = self.snapshot
        if s is None:
            return
        moment = now(self.clock, s)
        stale = moment >= s.valid_until
        yield _gauge("forecast_stale", "1 if the forecast's horizon is over", {(): float(stale)})
        issued, until = s.issued.timestamp(), s.valid_until.timestamp()
        yield _gauge("forecast_issued_timestamp_seconds", "start of the first step", {(): issued})
        yield _gauge("forecast_valid_until_timestamp_seconds", "end of the last step", {(): until})
        fallbacks = float(sum(reason is not None for reason in s.fallback))
        yield _gauge("fallback_entities", "entities with a naive forecast", {(): fallbacks})
        yield _gauge("entities", "entities that are forecast", {(): float(len(s.entities))})
        if stale:
            return
        yield from self._load(s, moment)

    def _load(self, s: Snapshot, moment: datetime) -> Iterator[Metric]:
        ahead: dict[tuple[str, ...], float] = {}
        peaks: dict[tuple[str, ...], float] = {}
        limits: dict[tuple[str, ...], float] = {}
        first = s.first_step(moment)
        for metric in s.metrics:
            total, _ = s.total(metric, None)
            for hours in _AHEAD:
                step = first + hours * 3600 // s.step
                if step < s.horizon:
                    for q in (0.5, _CAUTIOUS):
                        ahead[metric, f"{q:g}", f"{hours}"] = float(total[step, column(q)])
            q95 = f"{_CAUTIOUS:g}"
            for one in answers.peaks(s, self.clock, metric, _CAUTIOUS, _SHOWN)["peaks"]:
                peaks[one["entity"], metric, q95] = float(one["value"])
            if metric.removesuffix("_max") in FRACTIONS:
                passing = answers.limits(s, self.clock, metric, _LIMIT, _CAUTIOUS, _SHOWN)["limits"]
                for one in passing:
                    limits[one["entity"], metric, f"{_LIMIT:g}", q95] = 3600 * one["hours"]
        # Of a gauge a label called quantile would be taken for a summary's.
        labels = ("metric", "level", "ahead_hours")
        yield _gauge("total_ahead", "sum over entities, so many hours from now", ahead, labels)
        yield _gauge("peak", "highest peaks until the horizon's end", peaks, ("entity", "metric", "level"))
        labels4 = ("entity", "metric", "limit", "level")
        yield _gauge("time_to_limit_seconds", "until the quantile passes the limit", limits, labels4)


def _gauge(
    name: str, words: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"fleetcast_{name}", words, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
