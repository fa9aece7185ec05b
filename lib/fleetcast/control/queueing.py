"""Closed forms of queueing: what the simulator is checked against, and what a capacity curve is made of.

λ is a rate of arrivals [1/s], S a mean service time [s], c a number of servers, ρ = λS/c their utilisation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def erlang_b(servers: int, load: float) -> float:
    """The share of arrivals that find all of `servers` busy and are lost; `load` is λS."""
    if servers < 0 or load < 0:
        raise InputError(f"{servers} servers at a load of {load}, expected neither below 0")
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = load * blocked / (busy + load * blocked)
    return blocked


def erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that have to wait in M/M/c; 1 from a load of c on."""
    if load >= servers:
        return 1.0
    blocked = erlang_b(servers, load)
    return blocked / (1 - load / servers * (1 - blocked))


def mmc_wait(servers: int, rate: float, service: float) -> float:
    """Mean time in the queue of M/M/c [s]; infinite from full utilisation on."""
    spare = servers / service - rate
    return erlang_c(servers, rate * service) / spare if spare > 0 else math.inf


def mmc_tail(time: float, servers: int, rate: float, service: float) -> float:
    """The share of calls of an M/M/c, first come first served, whose response takes longer than `time`."""
    spare, mu = servers / service - rate, 1 / service
    if spare <= 0:
        return 1.0
    waits, alone = erlang_c(servers, rate * service), math.exp(-mu * time)
    if math.isclose(spare, mu, rel_tol=1e-9):
        return alone * (1 + waits * mu * time)
    return alone + waits * mu / (mu - spare) * (math.exp(-spare * time) - alone)


def mmc_quantile(q: float, servers: int, rate: float, service: float) -> float:
    """The response time of M/M/c that a share `q` of the calls stays below [s]."""
    if rate * service >= servers:
        return math.inf
    low, high = 0.0, service
    while mmc_tail(high, servers, rate, service) > 1 - q:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if mmc_tail(middle, servers, rate, service) > 1 - q else (low, middle)
    return high


def sakasegawa_wait(servers: float, rate: float, service: float) -> float:
    """About `mmc_wait`, in closed form and for any number of servers from 1 on, whole or not."""
    busy = rate * service / servers
    if busy >= 1:
        return math.inf
    return float(busy ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - busy)) * service)


def allen_cunneen_wait(
    servers: int, rate: float, service: float, arrival_scv: float, service_scv: float
) -> float:
    """About the mean wait of G/G/c, first come first served [s], of squared coefficients of variation."""
    return mmc_wait(servers, rate, service) * (arrival_scv + service_scv) / 2


def ps_response(rate: float, service: float, size: float | None = None) -> float:
    """Mean response time of M/G/1 with processor sharing [s], whatever the distribution of service times; of
    calls that need `size` alone, if given."""
    spare = 1 - rate * service
    return (service if size is None else size) / spare if spare > 0 else math.inf


def square_root_staffing(load: float, beta: float) -> int:
    """Servers for a load of λS with `beta` deviations to spare."""
    return math.ceil(load + beta * math.sqrt(load))


def servers_for(rate: float, service: float, quantile: float, limit: float) -> int:
    """Least servers of an M/M/c whose response time stays below `limit` for a share `quantile` of calls."""
    if mmc_tail(limit, 10**6, 0, service) > 1 - quantile:
        raise InputError(f"a service time of {service} s leaves no room for {limit} s, expected less")
    servers = max(1, math.floor(rate * service) + 1)
    while mmc_tail(limit, servers, rate, service) > 1 - quantile:
        servers += 1
    return servers


def traffic(outside: Floats, routing: Floats) -> Floats:
    """[S]. λ = γ(I − P)⁻¹: arrivals of each station, of those from outside [S] and the mean number of calls
    from station to station [S, S]."""
    return np.linalg.solve((np.eye(len(outside)) - routing).T, outside).astype(np.float64)


def visit_ratios(entry: Ints, caller: Ints, callee: Ints, calls: Floats, services: int) -> Floats:
    """[K, S]. Calls that each service gets for one request of each class, on average.

    `entry` [K] is the service that gets the requests; `caller` and `callee` [L] are the edges, each to a
    later service; `calls` [K, L] are the calls that a call of the caller makes.
    """
    visits = np.zeros((len(entry), services))
    visits[np.arange(len(entry)), entry] = 1
    for edge in np.argsort(caller, kind="stable"):
        visits[:, callee[edge]] += visits[:, caller[edge]] * calls[:, edge]
    return visits


def fluid_backlog(rate: float, capacity: float, delay: float) -> float:
    """Calls that wait after an overload of `delay` seconds."""
    return max(0.0, rate - capacity) * delay


def drain_time(backlog: float, rate: float, capacity: float) -> float:
    """Time until a backlog is gone at a capacity above the rate [s]."""
    return backlog / (capacity - rate) if capacity > rate else math.inf
