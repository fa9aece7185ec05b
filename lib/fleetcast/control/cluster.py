"""A cluster of services: what they call, what a call costs, how replicas start and fail, and its nodes.

`generate` makes one of `ClusterOptions`: a tree of calls with few hubs, as published call graphs are, and a
few services that many others call. `chain` makes the smallest ones, for closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fleetcast.config import Options
from fleetcast.control.queueing import visit_ratios

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["gateway", "worker", "cache", "store"]
Balancer = Literal["random", "round_robin", "p2c"]

#: Of a call's CPU time by kind: the median over services [core-s], and the deviation of a service's calls.
_DEMAND: dict[Kind, tuple[float, float]] = {
    "gateway": (0.002, 0.5),
    "worker": (0.008, 1.0),
    "cache": (0.0008, 0.5),
    "store": (0.005, 1.5),
}
#: Most calls below a gateway, one after the other.
_DEPTH = 4
#: Calls that a call makes at most, on average: a hub calls few of those that it knows.
_FAN_OUT = 3.0
#: Sizes of replicas [cores], and how many a service has about at the rate that the cluster is made for.
_SIZES, _REPLICAS = (1.0, 2.0, 4.0), 4


class LifeOptions(Options):
    """How replicas and nodes come and go."""

    start: float = Field(20, gt=0)
    """Time from a place on a node until a replica takes calls, median [s]."""
    start_sigma: float = Field(0.4, ge=0)
    """Its deviation, of the logarithm."""
    start_bounds: tuple[float, float] = (10, 60)
    """Its bounds [s]."""
    warm_up: float = Field(30, ge=0)
    """A replica is slower for so long after it is ready [s]."""
    warm_speed: float = Field(0.6, gt=0, le=1)
    """Its speed until then."""
    grace: float = Field(30, ge=0)
    """A replica that is to end finishes its calls for so long [s]; what is left is lost."""
    node_start: tuple[float, float] = (60, 180)
    """Time until a node is there that is asked for when a replica finds no room [s]."""
    node_idle: float = Field(600, gt=0)
    """An added node that has been empty for so long is given back [s]."""


class FaultOptions(Options):
    """What goes wrong. Rates are means."""

    crash_rate: float = Field(0.02, ge=0)
    """Crashes of a ready replica without warning [1/h]."""
    leak_rate: float = Field(0.1, ge=0)
    """How often a ready replica begins to leak memory [1/h]. It slows down above `leak_slows`, and is killed
    when its memory is full."""
    leak_time: float = Field(1200, gt=0)
    """Time from there until it is killed, median of a lognormal distribution [s]."""
    leak_slows: float = Field(0.7, gt=0, lt=1)
    """Memory in use above which a replica is slower, down to half its speed when it is full."""
    slow_rate: float = Field(0.1, ge=0)
    """How often a node becomes slow [1/h]."""
    slow_speed: float = Field(0.4, gt=0, le=1)
    """Speed of a slow node."""
    slow_time: float = Field(600, gt=0)
    """How long it stays slow [s]."""


class MeasureOptions(Options):
    """What an autoscaler sees."""

    interval: float = Field(15, gt=0)
    """Time between two decisions; a measurement is the mean of such a time [s]."""
    lag: float = Field(30, ge=0)
    """Age of the latest measurement at a decision, a multiple of `interval` [s]."""
    noise: float = Field(0.05, ge=0)
    """Relative deviation of what is measured."""
    missing: float = Field(0.01, ge=0, lt=1)
    """Share of the measurements of a service that are lost."""


class NodeClass(Options):
    name: str
    cores: float = Field(gt=0)
    """CPU of a node."""
    speed: float = Field(gt=0)
    """Of a core, against the one that demands are given for."""


class ClusterOptions(Options):
    """A synthetic cluster."""

    services: int = Field(25, ge=4, le=5000)
    """Services, gateways and stores included."""
    classes: int = Field(4, ge=1)
    """Classes of requests, each with its own path."""
    rate: float = Field(1000, gt=0)
    """Requests per second that the cluster is made for: at it, replicas are `utilisation` busy."""
    utilisation: float = Field(0.6, gt=0, lt=1)
    """Of the replicas that there are at first."""
    min_replicas: int = Field(2, ge=1)
    """Least replicas of a service."""
    max_replicas: int = Field(16, ge=1)
    """Most replicas of a service; memory and time of the vectorised engine grow with it."""
    slots: int = Field(32, ge=1)
    """Calls per core that a replica works on at once."""
    queue_seconds: float = Field(1, gt=0)
    """Calls that may wait for one replica, as seconds of its work."""
    balancer: Balancer = "p2c"
    """How a call finds a replica: any, all in turn, or the less busy of two."""
    deadline: float = Field(8, gt=1)
    """Deadline of a class's requests, in means of its latency without waiting."""
    retries: int = Field(1, ge=0)
    """How often a failed request is tried again, at most."""
    retry_budget: float = Field(0.2, ge=0)
    """Attempts after the first, at most, as share of the requests."""
    nodes: tuple[NodeClass, ...] = (
        NodeClass(name="old", cores=16, speed=0.8),
        NodeClass(name="standard", cores=16, speed=1),
        NodeClass(name="fast", cores=32, speed=1.25),
    )
    """Classes of nodes; the cluster has about as many of each."""
    headroom: float = Field(1.5, ge=1)
    """CPU of the nodes at first, in what replicas request at first."""
    most_nodes: float = Field(3, ge=1)
    """CPU of the most nodes, in what replicas request at first."""
    life: LifeOptions = LifeOptions()
    faults: FaultOptions = FaultOptions()
    measure: MeasureOptions = MeasureOptions()
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Cluster:
    """S services, L edges between them, K classes of requests, Z classes of nodes, M nodes at most.

    Services are numbered so that each calls only later ones.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    caller: Ints
    callee: Ints
    """[L]."""
    calls: Floats
    """[K, L]. Calls along the edge that one call of its caller makes, on average; one after the other."""
    entry: Ints
    """[K]. The service that gets the class's requests."""
    share: Floats
    """[K]. Of all requests."""
    deadline: Floats
    """[K]. An answer after this long counts for nothing, and the attempt as failed [s]."""
    retries: int
    """How often a failed request is tried again, at most."""
    retry_budget: float
    """Attempts after the first, at most, as share of the requests."""
    demand: Floats
    """[S]. CPU time of a call on a node of speed 1, on average [core-s]."""
    demand_cv: Floats
    """[S]. Its standard deviation in means; it is lognormal."""
    cores: Floats
    """[S]. CPU that a replica requests and may use; calls share it evenly, each at most one core."""
    slots: Ints
    """[S]. Calls that a replica works on at once; one that waits for calls of its own keeps its slot."""
    queue_limit: Ints
    """[S]. Calls that wait for a slot of one replica, at most; more are refused."""
    initial: Ints
    """[S]. Replicas at the start of an episode."""
    min_replicas: Ints
    max_replicas: Ints
    """[S]."""
    balancer: Balancer
    node_classes: tuple[NodeClass, ...]
    node_class: Ints
    """[M]. Class of each node."""
    initial_nodes: int
    """Nodes at first: the first so many."""
    rate: float
    """Requests per second that it is made for."""
    life: LifeOptions
    faults: FaultOptions
    measure: MeasureOptions

    @cached_property
    def visits(self) -> Floats:
        """[K, S]. Calls that a service gets for one request of a class, on average."""
        return visit_ratios(self.entry, self.caller, self.callee, self.calls, len(self.names))

    @cached_property
    def depth(self) -> Ints:
        """[S]. Calls from an entry to a service, at most."""
        depth = np.zeros(len(self.names), np.int64)
        for edge in np.argsort(self.caller, kind="stable"):
            depth[self.callee[edge]] = max(depth[self.callee[edge]], depth[self.caller[edge]] + 1)
        return depth

    @property
    def node_cores(self) -> Floats:
        """[M]."""
        return np.array([one.cores for one in self.node_classes])[self.node_class]

    @property
    def node_speed(self) -> Floats:
        """[M]."""
        return np.array([one.speed for one in self.node_classes])[self.node_class]


def generate(options: ClusterOptions) -> Cluster:
    """The cluster of some options; the same options, the same cluster."""
    random = np.random.default_rng([options.seed, 0x5E])
    kinds = _kinds(options)
    caller, callee = _edges(kinds, random)
    entry = np.arange(options.classes) % kinds.count("gateway")
    calls = _calls(kinds, caller, callee, entry, random)
    share = random.dirichlet(np.full(options.classes, 5.0))
    demand = np.array([_DEMAND[kind][0] for kind in kinds]) * random.lognormal(0, 0.4, len(kinds))

    visits = visit_ratios(entry, caller, callee, calls, len(kinds))
    load = options.rate * (share @ visits) * demand / options.utilisation
    sizes = np.array(_SIZES)
    cores = sizes[np.minimum(np.searchsorted(sizes * _REPLICAS, load), len(sizes) - 1)]
    initial = np.clip(np.ceil(load / cores), options.min_replicas, options.max_replicas).astype(np.int64)
    order, first = _nodes(options, float(initial @ cores))
    return Cluster(
        names=tuple(f"{kind}-{number:03d}" for number, kind in enumerate(kinds)),
        kinds=tuple(kinds),
        caller=caller,
        callee=callee,
        calls=calls,
        entry=entry,
        share=share,
        deadline=np.maximum(options.deadline * (visits @ demand), 0.05).round(3),
        retries=options.retries,
        retry_budget=options.retry_budget,
        demand=demand,
        demand_cv=np.array([_DEMAND[kind][1] for kind in kinds]),
        cores=cores,
        slots=(options.slots * cores).astype(np.int64),
        queue_limit=np.ceil(options.queue_seconds * cores / demand).astype(np.int64),
        initial=initial,
        min_replicas=np.full(len(kinds), options.min_replicas),
        max_replicas=np.full(len(kinds), options.max_replicas),
        balancer=options.balancer,
        node_classes=options.nodes,
        node_class=order,
        initial_nodes=first,
        rate=options.rate,
        life=options.life,
        faults=options.faults,
        measure=options.measure,
    )


def chain(
    demands: Sequence[float],
    *,
    replicas: int = 1,
    cores: float = 1,
    cv: float = 1,
    slots: int = 10_000,
    queue_limit: int = 1_000_000,
    balancer: Balancer = "random",
    deadline: float = 1e6,
    retries: int = 0,
    max_replicas: int | None = None,
    life: LifeOptions | None = None,
    measure: MeasureOptions | None = None,
) -> Cluster:
    """Services in a row, each of which calls the next one once, on as many nodes as are needed; no faults.

    As many slots as `cores` make it first come, first served; many slots make it processor sharing.
    """
    count = len(demands)
    most = max_replicas or replicas
    return Cluster(
        names=tuple(f"worker-{number}" for number in range(count)),
        kinds=tuple("worker" for _ in range(count)),
        caller=np.arange(count - 1),
        callee=np.arange(1, count),
        calls=np.ones((1, count - 1)),
        entry=np.zeros(1, np.int64),
        share=np.ones(1),
        deadline=np.array([deadline]),
        retries=retries,
        retry_budget=1,
        demand=np.array(demands, float),
        demand_cv=np.full(count, float(cv)),
        cores=np.full(count, float(cores)),
        slots=np.full(count, slots),
        queue_limit=np.full(count, queue_limit),
        initial=np.full(count, replicas),
        min_replicas=np.ones(count, np.int64),
        max_replicas=np.full(count, most),
        balancer=balancer,
        node_classes=(NodeClass(name="standard", cores=cores * most * count, speed=1),),
        node_class=np.zeros(1, np.int64),
        initial_nodes=1,
        rate=1,
        life=life or LifeOptions(warm_up=0),
        faults=FaultOptions(crash_rate=0, leak_rate=0, slow_rate=0),
        measure=measure or MeasureOptions(noise=0, missing=0),
    )


def _kinds(options: ClusterOptions) -> list[Kind]:
    """Gateways first, stores last."""
    count = options.services
    gateways = min(max(1, count // 25), options.classes)
    caches, stores = max(1, count // 6), max(1, count // 6)
    workers = count - gateways - caches - stores
    numbers: dict[Kind, int] = {"gateway": gateways, "worker": workers, "cache": caches, "store": stores}
    return [kind for kind, number in numbers.items() for _ in range(number)]


def _edges(kinds: list[Kind], random: np.random.Generator) -> tuple[Ints, Ints]:
    """A worker is called by an earlier one or a gateway, the more likely the more that one calls already; the
    last few workers by many more. A cache stands before a store, and workers call either."""
    of = {kind: [number for number, one in enumerate(kinds) if one == kind] for kind in _DEMAND}
    gateways, workers = of["gateway"], of["worker"]
    hot = workers[len(workers) - max(1, round(len(workers) ** 0.5 / 4)) :]
    out, depth = np.zeros(len(kinds)), np.zeros(len(kinds), int)
    edges: set[tuple[int, int]] = set()

    def call(source: int, target: int) -> None:
        edges.add((source, target))
        out[source] += 1
        depth[target] = max(depth[target], depth[source] + 1)

    for source, number in zip(gateways, workers, strict=False):
        call(source, number)
    for number in workers[len(gateways) :]:
        able = np.array([one for one in range(number) if depth[one] < _DEPTH - 1 and one not in hot])
        call(int(random.choice(able, p=(out[able] + 1) / (out[able] + 1).sum())), number)
    plain = [one for one in workers if one not in hot]
    for number in hot:
        for source in random.permutation(plain)[: max(1, len(plain) // 4)]:
            if depth[source] < _DEPTH:
                call(int(source), number)
    users = workers or gateways
    for cache, store in zip(of["cache"], of["store"], strict=True):
        call(int(random.choice(users)), cache)
        call(cache, store)
    backs = of["cache"] + of["store"]
    for number in users:
        if random.random() < 0.4:
            call(number, int(random.choice(backs)))
    pairs = np.array(sorted(edges))
    return pairs[:, 0], pairs[:, 1]


def _calls(kinds: list[Kind], caller: Ints, callee: Ints, entry: Ints, random: np.random.Generator) -> Floats:
    """[K, L]. A class takes most of the edges that it comes to, and each edge has a class that takes it. What
    a cache passes on is what it does not hold."""
    classes = len(entry)
    calls = random.uniform(0.3, 1, (classes, len(caller)))
    calls[:, [kinds[one] == "cache" for one in caller]] *= 0.4
    taken = random.random((classes, len(caller))) < 0.6
    reached = np.zeros((classes, len(kinds)), bool)
    reached[np.arange(classes), entry] = True
    for source in np.unique(caller):  # callers come before what they call
        edges = np.flatnonzero(caller == source)
        there = np.flatnonzero(reached[:, source])
        taken[random.choice(there, len(edges)), edges] = True
        calls[:, edges] *= taken[:, edges]
        calls[:, edges] *= np.minimum(
            1, _FAN_OUT / np.maximum(calls[:, edges].sum(1, keepdims=True), _FAN_OUT)
        )
        for edge in edges:
            reached[:, callee[edge]] |= reached[:, source] & taken[:, edge]
    return calls


def _nodes(options: ClusterOptions, requested: float) -> tuple[Ints, int]:
    """The class of each node, all classes in turn, until there is room enough; and how many are there at
    first."""
    cores = [one.cores for one in options.nodes]
    most = max(options.headroom, options.most_nodes) * requested
    order: list[int] = []
    room: list[float] = []
    while not room or room[-1] < most:
        order.append(len(order) % len(cores))
        room.append((room[-1] if room else 0) + cores[order[-1]])
    first = int(np.searchsorted(room, options.headroom * requested)) + 1
    return np.array(order), max(first, min(len(cores), len(order)))
