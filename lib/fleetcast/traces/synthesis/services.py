"""Services and the calls between them: requests that rise and fall by a factor of ten, and what they do to
processors and response times.

    request rate  =  mean · daily and weekly cycle · exp(shock) · (1 + flash crowds)
    cpu           =  idle + request rate ÷ capacity, at most 1
    latency       =  service time · (1 + ρ² / (1 − ρ)), ρ the utilisation: it climbs where the load does

Shocks are those of the machines' trace: with c = coupling, the share c of their variance comes from upstream,
half an hour to an hour ago. A flash crowd begins at the services that depend on none and reaches the others
with the same delays. So what a service's callers receive now tells what it will receive; latency and cpu say
it too, until the processors are full.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import i0

from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.synthesis.cluster import (
    DAY,
    KNOT,
    KNOTS,
    Array,
    Stream,
    SynthesizeOptions,
    generator,
    upstream,
)
from fleetcast.traces.synthesis.load import SHOCK, innovations, service_shock, span

#: A Monday, as everywhere where no date is known [s].
_EPOCH = 1_514_764_800
#: The logarithm of the daily cycle swings by so much around its mean: a factor of 9 from trough to peak.
_SWING = 1.1
#: How much less is asked for in the middle of the weekend.
_WEEKEND = 0.35
#: Standard deviations of the logarithms of: shocks, the services' sizes, what nobody could foresee of a rate
#: and of a latency.
_DEVIATION, _SIZES, _RATE_NOISE, _LATENCY_NOISE = 0.25, 0.7, 0.03, 0.08
#: Flash crowds begin so often [1/day], are so high, and have so many seconds to their peak.
_CROWDS, _HEIGHT, _RISE = 1.5, (0.5, 2.0), 1800.0
#: A crowd is forgotten after so many rises: 10 e^-9 is 0.1 % of its peak.
_FORGOTTEN = 10
_FULL = 0.96
_MISSING_ROWS = 0.01
_SLICE = 3600

_SERVICES = pa.schema(
    [
        ("time", pa.timestamp("ms", tz="UTC")),
        ("service", pa.string()),
        ("request_rate", pa.float32()),
        ("latency", pa.float32()),
        ("cpu", pa.float32()),
    ]
)
_CALLS = pa.schema(
    [
        ("time", pa.timestamp("ms", tz="UTC")),
        ("source", pa.string()),
        ("target", pa.string()),
        ("weight", pa.float32()),
    ]
)


def table_of(folder: str) -> TabularOptions:
    """How the files in a folder are read."""
    return TabularOptions(
        table=f"{folder}/services.parquet",
        entity="service",
        time="time",
        metrics=("request_rate", "latency", "cpu"),
        step=KNOT,
        edges=f"{folder}/calls.parquet",
    )


def name(service: int) -> str:
    """`s_1`, `s_2`, … of services that are counted from 0 here."""
    return f"s_{service + 1}"


def write_services(options: SynthesizeOptions, file: IO[bytes]) -> int:
    """Writes services.parquet; returns its rows."""
    return _write(options, file, _SERVICES, _services)


def write_calls(options: SynthesizeOptions, file: IO[bytes]) -> int:
    """Writes calls.parquet, each service's requests shared by those that it depends on; returns its rows."""
    return _write(options, file, _CALLS, _calls)


def _write(
    options: SynthesizeOptions,
    file: IO[bytes],
    schema: pa.Schema,
    make: Callable[[SynthesizeOptions, int], pa.Table],
) -> int:
    """Day by day, so that one day is in memory."""
    rows = 0
    with pq.ParquetWriter(file, schema) as writer:
        for day in range(options.days):
            table = make(options, day)
            writer.write_table(table)
            rows += len(table)
    return rows


def _services(options: SynthesizeOptions, day: int) -> pa.Table:
    count = options.service_count
    random = generator(options, Stream.ROWS, day)
    rate = np.stack([request_rate(options, service, day) for service in range(count)], axis=1)  # [KNOTS, S]
    rate *= random.lognormal(-(_RATE_NOISE**2) / 2, _RATE_NOISE, rate.shape)
    profiles = [profile(options, service) for service in range(count)]
    capacity, idle, service_time = np.array([(p.capacity, p.idle, p.service_time) for p in profiles]).T
    busy = rate / capacity
    cpu = processors(busy, idle, random)
    latency = response_time(busy, service_time) * random.lognormal(0, _LATENCY_NOISE, rate.shape)
    seen = random.random(rate.shape) >= _MISSING_ROWS
    knot, service = np.nonzero(seen)
    names = pa.array([name(number) for number in range(count)])
    return pa.table(
        [
            pa.array((_EPOCH + day * DAY + knot * KNOT) * 1000).cast(_SERVICES.field("time").type),
            names.take(pa.array(service)),
            *(pa.array(values[seen], pa.float32()) for values in (rate, latency, cpu)),
        ],
        schema=_SERVICES,
    )


def _calls(options: SynthesizeOptions, day: int) -> pa.Table:
    per_slice = _SLICE // KNOT
    sources, targets, weights = [], [], []
    for service in range(options.service_count):
        callers = upstream(options, service)
        if callers:
            received = request_rate(options, service, day).reshape(-1, per_slice).mean(1)
            for caller, _ in callers:
                sources.append(name(caller))
                targets.append(name(service))
                weights.append(received / len(callers))
    slices = KNOTS // per_slice
    pairs = len(sources)
    times = np.repeat((_EPOCH + day * DAY + _SLICE * np.arange(slices)) * 1000, pairs)
    return pa.table(
        [
            pa.array(times).cast(_CALLS.field("time").type),
            pa.array(sources * slices, pa.string()),
            pa.array(targets * slices, pa.string()),
            pa.array(np.array(weights).T.ravel(), pa.float32()),
        ],
        schema=_CALLS,
    )


class Profile(NamedTuple):
    """One service's regular behaviour."""

    mean: float
    """Requests [1/s]."""
    peak: float
    """Time of day of the most requests [s]."""
    weekend: float
    """How much less is asked for in the middle of the weekend, as a share."""
    capacity: float
    """Requests that fill its processors [1/s]."""
    idle: float
    """Share of the processors that are busy without requests."""
    service_time: float
    """Time that a request takes then [s]."""


@lru_cache(maxsize=1 << 16)
def profile(options: SynthesizeOptions, service: int) -> Profile:
    """What is drawn for a service."""
    random = generator(options, Stream.REQUESTS, service)
    mean = options.requests / options.service_count * random.lognormal(-(_SIZES**2) / 2, _SIZES)
    return Profile(
        mean=mean,
        peak=random.normal(15, 1.5) * 3600,
        weekend=_WEEKEND * random.uniform(0.7, 1.3),
        capacity=mean * random.uniform(3.2, 5.5),
        idle=random.uniform(0.02, 0.08),
        service_time=random.uniform(0.005, 0.06),
    )


def processors(busy: Array, idle: Array, random: np.random.Generator) -> Array:
    """cpu [0-1] where requests are the share `busy` of the capacity, with a little noise."""
    cpu: Array = np.clip(idle + (1 - idle) * busy + 0.01 * random.standard_normal(busy.shape), 0.005, 1)
    return cpu


def response_time(busy: Array, service_time: Array) -> Array:
    """Mean latency in the unit of `service_time`."""
    full = np.minimum(busy, _FULL)
    latency: Array = service_time * (1 + full**2 / (1 - full))
    return latency


@lru_cache(maxsize=1 << 12)
def request_rate(options: SynthesizeOptions, service: int, day: int) -> Array:
    """[KNOTS] requests that a service receives on a day [1/s], but for what nobody could foresee."""
    mean, peak, weekend, *_ = profile(options, service)
    time = day * DAY + KNOT * np.arange(KNOTS)
    # The trace starts on a Monday; Saturday and Sunday are one smooth dip.
    dip = 1 - weekend * np.sin(np.pi * np.clip(time / DAY % 7 - 5, 0, 2) / 2) ** 2
    cycle = np.exp(_SWING * np.cos(2 * np.pi * (time - peak) / DAY)) / i0(_SWING) * dip
    first, stop = day * KNOTS, (day + 1) * KNOTS
    noise = span(partial(innovations, options, Stream.REQUESTS, service), first - len(SHOCK) + 1, stop)
    shock = math.sqrt(1 - options.coupling) * np.convolve(noise, SHOCK, mode="valid")
    shock += math.sqrt(options.coupling) * service_shock(options, service, day)
    crowds = sum(
        (weight * _crowds(options, time - delay) for delay, weight in _ways(options, service).items()),
        start=np.zeros(KNOTS),
    )
    rate: Array = mean * cycle * np.exp(_DEVIATION * shock - _DEVIATION**2 / 2) * (1 + crowds)
    holiday = datetime.fromtimestamp(_EPOCH + day * DAY, UTC).date() in options.holidays
    return rate * options.holiday_load if holiday else rate


@lru_cache(maxsize=1 << 16)
def _ways(options: SynthesizeOptions, service: int) -> dict[int, float]:
    """Delay [s] of each way from a service that depends on none → its share; they sum to 1."""
    callers = upstream(options, service)
    if not callers:
        return {0: 1.0}
    ways: dict[int, float] = defaultdict(float)
    for caller, delay in callers:
        for earlier, share in _ways(options, caller).items():
            ways[earlier + delay * KNOT] += share / len(callers)
    return dict(ways)


def _crowds(options: SynthesizeOptions, time: Array) -> Array:
    """What flash crowds add at these times, as a share of the usual requests."""
    days = range(int((time[0] - _FORGOTTEN * _RISE) // DAY), int(time[-1] // DAY) + 1)
    total = np.zeros(len(time))
    for start, height in (crowd for day in days for crowd in _crowds_of(options, day)):
        since = np.maximum(time - start, 0) / _RISE
        total += height * since * np.exp(1 - since)
    return total


@lru_cache(maxsize=1 << 12)
def _crowds_of(options: SynthesizeOptions, day: int) -> tuple[tuple[float, float], ...]:
    """Start [s] and height of the flash crowds that begin on a day."""
    random = generator(options, Stream.CROWDS, 1 + day)
    starts = day * DAY + DAY * random.random(random.poisson(_CROWDS))
    return tuple((float(start), float(random.uniform(*_HEIGHT))) for start in np.sort(starts))
