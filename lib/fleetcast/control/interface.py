"""What a policy sees, what it may do, and what comes of it: the same for both engines, every rule and every
learned policy.

Tensors are float32, [E, S] for E environments that go on side by side and S services, or [E, S, Z] with the
Z classes of nodes. Time goes on in decision intervals: a policy observes, acts, and the cluster goes on for
one interval.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fleetcast.control.cluster import Cluster

#: Upper bounds of the bins in which latencies of requests are counted [s]; one more bin is above them.
LATENCY_BOUNDS = torch.logspace(-3, 2, 101)


@dataclass(frozen=True)
class Truth:
    """What no autoscaler can see: for the clairvoyant bound and for tests."""

    rate: Tensor
    """[E, S]. Calls that arrive now, without noise [1/s]."""
    queue: Tensor
    """[E, S]. Calls that are in the service's replicas now, in work or waiting."""
    ahead: Tensor
    """[E, H, S]. Calls that will arrive in the next H decision intervals, on average of each, if nothing is
    refused or tried again [1/s]."""


@dataclass(frozen=True)
class Observation:
    """What an autoscaler sees at a decision.

    What the cluster's own records hold (`wanted` to `pending`, `ready_by_class`) is up to date. What is
    measured (all others) is the mean of one interval of measurement that ended `lag` seconds ago, with noise;
    NaN where the measurement is missing.
    """

    time: float
    """Since the start of the episode [s]."""
    interval: float
    """Time until the next decision [s]."""
    lag: float
    """Age of what is measured [s]."""
    wanted: Tensor
    """[E, S]. Replicas that were asked for."""
    ready: Tensor
    """[E, S]. Replicas that take calls."""
    starting: Tensor
    """[E, S]. Replicas that do not yet take calls, those without a node included."""
    pending: Tensor
    """[E, S]. Of these, replicas for which no node has room."""
    measured: Tensor
    """[E, S]. Replicas of which `cpu` is the mean: those that were ready for the whole measurement and are
    still. 0 where it is missing."""
    rate: Tensor
    """[E, S]. Calls that arrived [1/s]."""
    latency_p50: Tensor
    latency_p95: Tensor
    """[E, S]. Time from a call's arrival to its answer, with all calls that it makes in turn [s]."""
    cpu: Tensor
    """[E, S]. CPU use of the `measured` replicas as share of what they request; may exceed 1 nowhere, as the
    request is the limit."""
    memory: Tensor
    """[E, S]. Memory use of the replica that uses most, as share of its limit: at 1 it is killed."""
    queue: Tensor
    """[E, S]. Calls in work or waiting, all replicas together."""
    errors: Tensor
    """[E, S]. Calls that were refused or lost with a replica [1/s]."""
    ready_by_class: Tensor
    """[E, S, Z]. Of `ready`, on nodes of each class."""
    cpu_by_class: Tensor
    """[E, S, Z]. As `cpu`, of the replicas on nodes of each class; NaN without any."""
    latency_by_class: Tensor
    """[E, S, Z]. Mean time of a call in a replica itself, on nodes of each class [s]; NaN without any."""
    offered: Tensor
    """[E, K]. Requests of each class that users made, repetitions not counted [1/s]."""
    request_p95: Tensor
    """[E, K]. Latency of requests of each class [s]."""
    missed: Tensor
    """[E, K]. Requests of each class that failed or came after their deadline, as share of those tried."""
    truth: Truth | None = None
    """Only if the engine was asked for it."""


@dataclass(frozen=True)
class Action:
    """What shall be from now on."""

    replicas: Tensor
    """[E, S]. Replicas wanted; rounded, and bounded by the cluster's smallest and largest numbers."""
    routing: Tensor | None = None
    """[E, S, Z]. Weight of a replica by its node's class, at least 0; None or all 0: all alike."""
    restart: Tensor | None = None
    """[E, S], bool. Whether the ready replica that uses most memory is drained and started anew, while
    another one is ready."""


@dataclass(frozen=True)
class Outcome:
    """What came of some time, as sums: those of longer times, or of more runs, are sums of these."""

    seconds: Tensor
    """[E]. Simulated time."""
    offered: Tensor
    """[E]. Requests that users made."""
    answered: Tensor
    """[E]. Requests that were answered, in time or late."""
    good: Tensor
    """[E]. Requests that were answered before their deadline."""
    failed: Tensor
    """[E]. Attempts that were refused or lost, or came after their deadline."""
    retried: Tensor
    """[E]. Attempts after the first."""
    latency: Tensor
    """[E]. Latency, summed over the attempts that were answered [s]."""
    held: Tensor
    """[E, S]. Calls in a service's own replicas, those that wait there among them, times time: what requests
    spend there (Little's law) [s]."""
    latencies: Tensor
    """[E, B]. Attempts that were answered, by the bins of LATENCY_BOUNDS."""
    cpu_used: Tensor
    """[E]. CPU time spent in calls [core-s]."""
    cpu_allocated: Tensor
    """[E]. CPU that replicas requested, from their place on a node to their end [core-s]."""
    replica_seconds: Tensor
    """[E]. Replicas in existence, from their place on a node to their end [s]."""
    node_seconds: Tensor
    """[E]. Nodes in existence [s]."""
    changes: Tensor
    """[E]. Replicas by which what is wanted changed, up and down."""
    restarts: Tensor
    """[E]. Replicas that were started anew: crashed ones and preventive ones."""

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def quantile(self, q: float) -> Tensor:
        """[E]. The latency below which this share of the answered attempts stays [s]; NaN without any."""
        counts = self.latencies.double().cumsum(1)
        total = counts[:, -1:]
        bounds = LATENCY_BOUNDS.to(counts.device)
        place = torch.searchsorted(counts, q * total).clamp(max=len(bounds) - 1)
        low = bounds[(place - 1).clamp(min=0)] * (place > 0)
        below = counts.gather(1, (place - 1).clamp(min=0)) * (place > 0)
        within = (q * total - below) / (counts.gather(1, place) - below)
        value = low + (bounds[place] - low) * within.clamp(0, 1)
        return torch.where(total > 0, value, torch.nan).squeeze(1).float()


class Policy(Protocol):
    """Decides for all environments at once. It may keep what it has seen, per environment."""

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""

    def act(self, observation: Observation) -> Action: ...


class Engine(Protocol):
    """A cluster that can be run: the event-driven one or the vectorised one."""

    cluster: Cluster
    environments: int

    def observe(self, truth: bool = False) -> Observation: ...

    def step(self, action: Action) -> Outcome:
        """Lets one decision interval pass."""


def run(engine: Engine, policy: Policy, intervals: int, *, truth: bool = False) -> list[Outcome]:
    """Lets a policy decide for some intervals; what came of each. `truth` is for a clairvoyant policy."""
    policy.reset(engine.cluster, engine.environments)
    return [engine.step(policy.act(engine.observe(truth))) for _ in range(intervals)]


def total(outcomes: list[Outcome]) -> Outcome:
    """What came of all of them together."""
    return reduce(add, outcomes)
