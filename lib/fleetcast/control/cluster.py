"""A cluster of services: what they call, what a call costs, how replicas start, and which nodes there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["gateway", "worker", "cache", "store"]
Balancer = Literal["random", "round_robin", "p2c"]


@dataclass(frozen=True)
class Cluster:
    """S services, L edges between them, K classes of requests, Z classes of nodes.

    Services are numbered so that each calls only later ones.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    caller: Ints
    callee: Ints
    """[L]."""
    calls: Floats
    """[K, L]. Calls along the edge that one call of its caller makes, on average."""
    entry: Ints
    """[K]. The service that gets the class's requests."""
    share: Floats
    """[K]. Of all requests."""
    deadline: Floats
    """[K]. After this long an answer is of no use [s]."""
    retries: Ints
    """[K]. How often a failed request is tried again, at most."""
    retry_budget: float
    """Attempts after the first, at most, as share of the requests."""
    demand: Floats
    """[S]. CPU time of a call on a node of speed 1, on average [core-s]."""
    demand_cv: Floats
    """[S]. Its standard deviation in means; it is lognormal."""
    cores: Floats
    """[S]. CPU that a replica requests, and may use at most."""
    slots: Ints
    """[S]. Calls that a replica works on at once; a call keeps its slot while it waits for calls of its own."""
    queue_limit: Ints
    """[S]. Calls that wait for a slot of one replica, at most; more are refused."""
    min_replicas: Ints
    max_replicas: Ints
    """[S]."""

    @property
    def visits(self) -> Floats:
        """[K, S]. Calls that a service gets for one request of a class, on average."""
        visits = np.zeros((len(self.entry), len(self.names)))
        visits[np.arange(len(self.entry)), self.entry] = 1
        for edge in np.argsort(self.caller, kind="stable"):
            visits[:, self.callee[edge]] += visits[:, self.caller[edge]] * self.calls[:, edge]
        return visits
