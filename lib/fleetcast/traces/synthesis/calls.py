"""Who calls whom, how often, and the traces that are sampled of it.

A service calls those that depend on it, mostly by rpc, else through a queue; and its cache and its database,
of which there is nothing but calls. Requests come from outside to the services that depend on none. What a
service receives is shared by its callers, so a call of one makes, on average, so many calls of the other:

    calls of an edge  =  requests of its target ÷ callers of the target       (a service)
                      =  requests of its source · so many a request           (a cache or database)

A trace follows one request in two hundred from outside through all that it causes: each call makes, of every
edge, a random number of calls with that mean. So the number of sampled calls of an edge is, at any time and
on average, its true rate times the share that is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import polars as pl

from fleetcast.traces.synthesis.cluster import (
    KNOT,
    KNOTS,
    Array,
    Stream,
    SynthesizeOptions,
    generator,
    layer_starts,
    upstream,
)
from fleetcast.traces.synthesis.replicas import MINUTE, born, replicas
from fleetcast.traces.synthesis.services import profile, request_rate, response_time

#: One request in so many is traced.
SAMPLED = 0.005
#: The source of requests from outside.
OUTSIDE = -1
#: The containers of a cache or database, of which nothing is measured.
_STORE_REPLICAS = 8
_QUEUES = 0.1
_CACHED, _PER_CACHED = 0.7, (0.5, 1.5)
_STORED, _PER_STORED = 0.5, (0.1, 0.5)
#: A message waits for up to so long; all of a trace happens within a minute [ms].
_WAIT, _LONGEST = 10_000, 59_900
#: Shares of the calls that are logged by caller and callee, by the caller alone, by the callee alone.
_LOGGED = (0.45, 0.3, 0.25)
#: Shares of the log's lines that do not know who is at the other end, and of the calls that carry the id of
#: the one before.
_NAMELESS, _LOST_CONTEXT = 0.12, 0.1


class Kind(IntEnum):
    """How a call is made."""

    HTTP = 0
    RPC = 1
    MQ = 2
    MC = 3
    DB = 4


@dataclass(frozen=True)
class Edges:
    """Who calls whom, [E] each, in the order of the sources. Caches and databases follow the services."""

    source: Array
    target: Array
    kind: Array
    callers: Array
    """Of the target, where it is a service."""
    per_request: Array
    """Calls a request of the source, where the target is none."""
    first: Array
    """[sources + 1] where each source's edges begin."""


def store_count(options: SynthesizeOptions) -> int:
    """Caches and databases, in turn."""
    return 2 * max(1, options.service_count // 8)


@lru_cache(maxsize=4)
def edges(options: SynthesizeOptions) -> Edges:
    """All edges of the trace."""
    services, pairs = options.service_count, store_count(options) // 2
    rows: list[tuple[float, ...]] = []
    for service in range(services):
        random = generator(options, Stream.EDGES, service)
        callers = upstream(options, service)
        for caller, _ in callers:
            kind = Kind.MQ if random.random() < _QUEUES else Kind.RPC
            rows.append((caller, service, kind, len(callers), 0))
        for kind, share, calls in ((Kind.MC, _CACHED, _PER_CACHED), (Kind.DB, _STORED, _PER_STORED)):
            some, store, amount = random.random(), int(random.integers(pairs)), random.uniform(*calls)
            if some < share:
                rows.append((service, services + 2 * store + (kind == Kind.DB), kind, 1, amount))
    rows.sort()
    *whole, per_request = np.array(rows).reshape(-1, 5).T
    source, target, kinds, number = (column.astype(np.int64) for column in whole)
    first = np.searchsorted(source, np.arange(services + store_count(options) + 1))
    return Edges(source, target, kinds, number, per_request, first)


@lru_cache(maxsize=3)
def _rates_of_day(options: SynthesizeOptions, day: int) -> Array:
    """[KNOTS, S] requests of every service."""
    return np.stack([request_rate(options, service, day) for service in range(options.service_count)], axis=1)


def rates(options: SynthesizeOptions, times: Array) -> Array:
    """[T, S] requests that every service receives at times [s]: none before it is born."""
    knot = np.clip(times / KNOT, 0, None)
    before = knot.astype(np.int64)
    weight = (knot - before)[:, None]

    def at(knots: Array) -> Array:
        found = np.empty((len(knots), options.service_count))
        for day in np.unique(knots // KNOTS).tolist():
            here = knots // KNOTS == day
            found[here] = _rates_of_day(options, day)[knots[here] % KNOTS]
        return found

    births = np.array([born(options, service) for service in range(options.service_count)])
    found: Array = (at(before) * (1 - weight) + at(before + 1) * weight) * (times[:, None] >= births)
    return found


def edge_rates(options: SynthesizeOptions, received: Array) -> Array:
    """[T, E] calls of every edge [1/s] where the services receive [T, S]."""
    e = edges(options)
    to_service = e.target < options.service_count
    of_service = received[:, np.where(to_service, e.target, e.source)]
    calls: Array = of_service * np.where(to_service, 1 / e.callers, e.per_request)
    return calls


def latencies(options: SynthesizeOptions, received: Array) -> Array:
    """[T, S + stores] time that an answer takes [s] where the services receive [T, S]."""
    profiles = [profile(options, service) for service in range(options.service_count)]
    capacity, service_time = np.array([(p.capacity, p.service_time) for p in profiles]).T
    of_stores = np.tile([3e-4, 1.5e-3], (len(received), store_count(options) // 2))
    return np.concatenate([response_time(received / capacity, service_time), of_stores], axis=1)


def traces(options: SynthesizeOptions, minute: int) -> pl.DataFrame:
    """All calls of the traces that begin in a minute, a row each, in no order: what truly happened.

    `trace` (counted within the minute), `root` (the service that the request came to), `time` [ms], `id`
    (`0.1.3.2`), `kind`, `source`, `target`, `source_replica` and `target_replica` (positions in `replicas`,
    or for a cache or database the number of its container), `rt` [ms]; and what the log has of it: whose line
    there is (`by_caller`, `by_callee`), and whether it has the other's name (`target_named`, `source_named`).
    """
    random = generator(options, Stream.CALLS, minute)
    received = rates(options, np.array([minute * MINUTE + MINUTE // 2]))
    calls = edge_rates(options, received)[0]
    e, services = edges(options), options.service_count
    with np.errstate(invalid="ignore", divide="ignore"):
        per_call = np.where(calls > 0, calls / received[0, e.source], 0.0)
    wait = 1000 * latencies(options, received)[0]
    running = _Running(options, minute * MINUTE)

    entries = layer_starts(options)[1]
    number = random.poisson(received[0, :entries] * SAMPLED * MINUTE)
    target = np.repeat(np.arange(entries), number)
    size = len(target)
    start = MINUTE * 1000 * minute + random.integers(0, MINUTE * 1000, size)
    level = {
        "trace": np.arange(size),
        "root": target,
        "start": start,
        "time": start,
        "kind": np.full(size, Kind.HTTP),
        "source": np.full(size, OUTSIDE),
        "target": target,
        "source_replica": np.full(size, OUTSIDE),
        "target_replica": running.pick(target, random),
    }
    ids = pl.Series(["0", "0.1"]).gather(random.integers(0, 2, size))
    found = [pl.DataFrame(level).with_columns(ids.alias("id"))]
    while len(found[-1]):
        # Of every call the calls that it makes: along every edge of its target, so many times.
        target = level["target"]
        degree = e.first[target + 1] - e.first[target]
        parent = np.repeat(np.arange(len(target)), degree)
        edge = (
            np.arange(len(parent)) - np.repeat(np.cumsum(degree) - degree, degree) + e.first[target][parent]
        )
        times = random.poisson(per_call[edge])
        parent, edge = np.repeat(parent, times), np.repeat(edge, times)
        place, kind, start = _places(parent), e.kind[edge], level["start"][parent]
        waited = np.where(
            kind == Kind.MQ, random.integers(0, _WAIT, len(edge)), random.integers(0, 4, len(edge))
        )
        # Context is lost between two calls of caches or databases, which cause no others.
        stray = (place > 1) & (random.random(len(edge)) < _LOST_CONTEXT) & (kind >= Kind.MC)
        stray[1:] &= (kind[:-1] >= Kind.MC) & (e.target[edge[1:]] != e.target[edge[:-1]])
        ids = ids.gather(parent) + "." + pl.Series(place - stray).cast(pl.String)
        level = {
            "trace": level["trace"][parent],
            "root": level["root"][parent],
            "start": start,
            "time": np.minimum(level["time"][parent] + place + waited, start + _LONGEST),
            "kind": kind,
            "source": e.source[edge],
            "target": e.target[edge],
            "source_replica": level["target_replica"][parent],
            "target_replica": running.pick(e.target[edge], random),
        }
        found.append(pl.DataFrame(level).with_columns(ids.alias("id")))
    every = pl.concat(found).drop("start")
    target, kind = every["target"].to_numpy(), every["kind"].to_numpy()
    inner = (kind != Kind.HTTP) & (target < services)
    logged = random.choice(3, len(every), p=_LOGGED)
    return every.with_columns(
        rt=np.rint(wait[target] * random.lognormal(0, 0.5, len(every))).astype(np.int64),
        by_caller=np.where(inner, logged < 2, kind != Kind.HTTP),
        by_callee=np.where(inner, logged != 1, kind == Kind.HTTP),
        target_named=~inner | (random.random(len(every)) >= _NAMELESS),
        source_named=inner & (random.random(len(every)) >= _NAMELESS),
    )


def _places(parents: Array) -> Array:
    """1, 2, … for the children of each parent, which lie side by side."""
    place = np.arange(len(parents))
    fresh = np.r_[True, parents[1:] != parents[:-1]][: len(parents)]
    return place - np.maximum.accumulate(np.where(fresh, place, 0)) + 1


class _Running:
    """The containers that run in a minute."""

    def __init__(self, options: SynthesizeOptions, time: int) -> None:
        everyone = replicas(options)
        self.services = options.service_count
        self.order = np.flatnonzero(everyone.running(np.array([time]))[0])
        of = everyone.service[self.order]  # they are in the order of their services
        self.first = np.searchsorted(of, np.arange(self.services + 1))

    def pick(self, targets: Array, random: np.random.Generator) -> Array:
        """[C] a container for each call."""
        place = random.random(len(targets))
        service = np.minimum(targets, self.services - 1)
        first, count = self.first[service], self.first[service + 1] - self.first[service]
        chosen = self.order[np.minimum(first + (place * count).astype(np.int64), len(self.order) - 1)]
        found: Array = np.where(targets < self.services, chosen, (place * _STORE_REPLICAS).astype(np.int64))
        return found
