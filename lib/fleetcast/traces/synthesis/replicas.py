"""Containers that come and go: when each runs, under which number, and its share of its service's requests.

A service of a trace with `churn` has rollouts, at which its containers are replaced by new ones, one a
minute; some containers start late or stop early; and some services of the last layer begin in the middle.
Everything changes at whole minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from fleetcast.traces.synthesis.cluster import (
    DAY,
    Array,
    Stream,
    SynthesizeOptions,
    generator,
    layer_starts,
    placement,
)

MINUTE = 60
#: Standard deviation of the logarithm of how much more of the requests one container gets than another.
_UNEVEN = 0.15


@dataclass(frozen=True)
class Replicas:
    """Every container of the trace, [R] each; those that one rollout after another puts in a place, too."""

    service: Array
    machine: Array
    number: Array
    """Counted from 0 within the service; a new container has a new one."""
    start: Array
    """It runs from here [s] …"""
    stop: Array
    """… to before here [s]."""
    nominal: Array
    """As how many containers of its service its capacity is meant."""
    weight: Array
    """A service's requests are shared by the weights of those that run."""

    def running(self, times: Array) -> Array:
        """[T, R] whether each runs at the times [s]."""
        at = times[:, None]
        found: Array = (self.start <= at) & (at < self.stop)
        return found

    def among(self, first: int, stop: int) -> Replicas:
        """Those that run at some time of a stretch [s]."""
        chosen = (self.start < stop) & (self.stop > first)
        return Replicas(**{name: values[chosen] for name, values in vars(self).items()})


def born(options: SynthesizeOptions, service: int) -> int:
    """When a service begins [s]: 0 but for a few of the last layer where there is churn."""
    *_, first, end = layer_starts(options)
    if service < max(1, end - math.ceil(options.churn * (end - first))):
        return 0
    share = generator(options, Stream.ROLLOUTS, 0, service).uniform(0.3, 0.7)
    return int(share * options.span) // MINUTE * MINUTE


@lru_cache(maxsize=4)
def replicas(options: SynthesizeOptions) -> Replicas:
    """All containers of the trace, service by service."""
    places = np.array([placement(options, container) for container in range(options.container_count)])
    order = np.argsort(places[:, 1], kind="stable")
    borders = np.searchsorted(places[order, 1], np.arange(1, options.service_count))
    rows = [
        row
        for service, containers in enumerate(np.split(order, borders))
        for row in _of_service(options, service, containers, places[containers, 0])
    ]
    *whole, weight = np.array(rows).T
    service, machine, number, start, stop, nominal = (column.astype(np.int64) for column in whole)
    return Replicas(service, machine, number, start, stop, nominal, weight)


def _of_service(
    options: SynthesizeOptions, service: int, containers: Array, machines: Array
) -> list[tuple[float, ...]]:
    """The columns of `Replicas` of one service. Its first container never stops: somebody must answer."""
    begin, count = born(options, service), len(containers)
    rollouts = _rollouts(options, service)
    rows: list[tuple[float, ...]] = []
    for place, (container, machine) in enumerate(zip(containers.tolist(), machines.tolist(), strict=True)):
        random = generator(options, Stream.REPLICA, container)
        weight, fate, when = random.lognormal(0, _UNEVEN), random.random(), random.random()
        start, stop = begin, options.span
        change = int(start + when * (stop - start)) // MINUTE * MINUTE
        if place and fate < options.churn / 2:
            start = change
        elif place and fate < options.churn:
            stop = change
        replaced = [at + place * MINUTE for at in rollouts]
        cuts = [start, *(at for at in replaced if start < at < stop), stop]
        for generation, (since, until) in enumerate(pairwise(cuts)):
            rows.append((service, machine, place + generation * count, since, until, count, weight))
    return rows


def _rollouts(options: SynthesizeOptions, service: int) -> list[int]:
    """When the containers of a service begin to be replaced [s]."""
    random = generator(options, Stream.ROLLOUTS, 1, service)
    days = np.flatnonzero(random.random(options.days) < options.churn)
    minutes = random.integers(DAY // MINUTE, size=len(days))
    return [int(at) for at in days * DAY + minutes * MINUTE]
