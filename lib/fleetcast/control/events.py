"""The event-driven engine: every request, call by call. Slow, and the reference for the vectorised one.

A call comes to a service, and the balancer names a replica. There it takes a slot, or waits for one, or is
refused. With a slot it shares the replica's cores with the others until its CPU time is spent; then it makes
its calls, one after the other; then it answers and gives up its slot. A call that is refused, or lost with
its replica, fails its caller at once, up to the request. A request that has not been answered by its deadline
is tried again, while what is left of the first attempt goes on.

Replicas and nodes live as in `pods`, which looks once a second.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import LATENCY_BOUNDS, Action, Observation, Outcome, Truth
from fleetcast.control.measuring import Measurement, Measuring
from fleetcast.control.pods import DRAINING, READY, Pods
from fleetcast.control.traffic import AHEAD, Traffic
from fleetcast.errors import InputError

#: How often replicas and nodes are looked after [s].
_TICK = 1.0
#: Random numbers that are drawn at once.
_BLOCK = 8192
#: Attempts after the first that may come at once, whatever the budget.
_AT_ONCE = 10.0


class _Attempt:
    """A request, tried for the `tries`-th time."""

    __slots__ = ("began", "kind", "over", "tries")

    def __init__(self, kind: int, began: float, tries: int) -> None:
        self.kind, self.began, self.tries, self.over = kind, began, tries, False


class _Call:
    __slots__ = ("arrived", "attempt", "caller", "pod", "service", "todo")

    def __init__(self, attempt: _Attempt, service: int, caller: _Call | None, arrived: float) -> None:
        self.attempt, self.service, self.caller, self.arrived = attempt, service, caller, arrived
        self.pod: _Pod | None = None
        self.todo: list[int] = []


class _Pod:
    """A replica: calls that share its cores, by the CPU time at which each has enough."""

    __slots__ = (
        "calls", "cores", "cpu", "own", "place", "served", "service", "since", "speed", "spent", "version",
        "waiting", "work",
    )  # fmt: skip

    def __init__(self, service: int, place: int, cores: float, speed: float, now: float) -> None:
        self.service, self.place, self.cores, self.speed = service, place, cores, speed
        self.work: list[tuple[float, int, _Call]] = []
        self.waiting: deque[_Call] = deque()
        self.calls: set[_Call] = set()
        """With a slot: in work, or waiting for calls of their own."""
        self.spent = 0.0
        """CPU time that each of the calls in work would have had from the beginning on."""
        self.since, self.version = now, 0
        self.cpu = self.own = self.served = 0.0

    def pass_time(self, now: float) -> None:
        count = len(self.work)
        if count:
            time = now - self.since
            self.spent += time * self.speed * min(1.0, self.cores / count)
            self.cpu += time * min(count, self.cores)
        self.own += (now - self.since) * (count + len(self.waiting))
        self.since = now

    def next_done(self) -> float:
        """When the first of the calls in work has its CPU time, if none comes."""
        count = len(self.work)
        return self.since + (self.work[0][0] - self.spent) / (self.speed * min(1.0, self.cores / count))


class EventEngine:
    """One environment. The same arguments, the same run."""

    environments = 1

    def __init__(self, cluster: Cluster, traffic: Traffic, *, seed: int = 0) -> None:
        if traffic.rates.shape[0] != 1 or traffic.rates.shape[2] != len(cluster.entry):
            raise InputError(
                f"traffic of {traffic.rates.shape[0]} environments and {traffic.rates.shape[2]} classes, "
                f"expected 1 and {len(cluster.entry)}"
            )
        self.cluster, self.traffic = cluster, traffic
        self.time = 0.0
        generator = torch.Generator().manual_seed(seed)
        self._random = np.random.default_rng([seed, 0xEE])
        self._life = Pods(cluster, 1, generator, torch.device("cpu"))
        self._measuring = Measuring(cluster, self._life, generator)

        scale = np.sqrt(np.log1p(cluster.demand_cv**2))
        self._demand = [
            self._lognormal(mean, sigma) for mean, sigma in zip(cluster.demand, scale, strict=True)
        ]
        self._uniform = self._uniforms()
        self._cores, self._slots = cluster.cores.tolist(), cluster.slots.tolist()
        self._limit = cluster.queue_limit.tolist()
        self._edges: list[list[list[tuple[int, int, float]]]] = [
            [[] for _ in cluster.names] for _ in cluster.entry
        ]
        for kind, calls in enumerate(cluster.calls):
            for caller, callee, count in zip(cluster.caller, cluster.callee, calls.tolist(), strict=True):
                if count:
                    self._edges[kind][caller].append((int(callee), int(count), count % 1))

        self._events: list[tuple[float, int, int, object, int]] = []
        self._order = itertools.count()
        self._pods: dict[tuple[int, int], _Pod] = {}
        self._ready: list[list[_Pod]] = [[] for _ in cluster.names]
        self._weights: list[list[float] | None] = [None for _ in cluster.names]
        self._turn = [0.0] * len(cluster.names)
        self._credit: dict[_Pod, float] = {}
        self._routing: Tensor | None = None
        self._tokens = _AT_ONCE
        self._clear()
        self._follow()

    # -- what a policy deals with ----------------------------------------------------------------------------

    def step(self, action: Action) -> Outcome:
        """Lets one decision interval pass."""
        life, interval = self._life, self.cluster.measure.interval
        life.changes.zero_()
        life.restarts.zero_()
        self._clear()
        if action.restart is not None:
            life.restart(action.restart)
        life.scale(action.replicas)
        self._routing = action.routing
        self._count_calls()
        life.fail(interval)
        self._follow()
        end = self.time + interval
        while self.time < end - 1e-9:
            self._run(min(self.time + _TICK, end))
        outcome = self._outcome(interval)
        self._measuring.record(self._measured(interval))
        return outcome

    def observe(self, truth: bool = False) -> Observation:
        """What there is to see now; `truth` adds what no autoscaler can see."""
        return self._measuring.observe(self.time, self._truth() if truth else None)

    # -- time ------------------------------------------------------------------------------------------------

    def _run(self, end: float) -> None:
        """Lets requests come and events happen until `end`, at which replicas and nodes are looked after."""
        start, events = self.time, self._events
        for kind, rate in enumerate(self.traffic.at(start)[0].tolist()):
            for at in self._random.uniform(start, end, self._random.poisson(rate * (end - start))):
                heappush(events, (at, next(self._order), 0, _Attempt(kind, at, 1), 0))
        while events and events[0][0] < end:
            self.time, _, what, of, version = heappop(events)
            if what == 1:
                if of.version == version:  # type: ignore[attr-defined]
                    self._worked(of)  # type: ignore[arg-type]
            elif what == 0:
                self._try(of)  # type: ignore[arg-type]
            elif not of.over:  # type: ignore[attr-defined]
                self._failed(of)  # type: ignore[arg-type]
        self.time = end
        passed = end - start
        on_node = self._life.on_node
        self._allocated += passed * float((on_node * torch.tensor(self._cores).unsqueeze(1)).sum())
        self._replica_seconds += passed * float(on_node.sum())
        self._node_seconds += passed * float(self._life.there.sum())
        for pod in self._pods.values():
            pod.pass_time(end)
            self._queue[pod.service] += passed * (len(pod.calls) + len(pod.waiting))
        self._count_calls()
        self._life.pass_time(passed)
        self._follow()

    def _count_calls(self) -> None:
        self._life.number.zero_()
        for (service, place), pod in self._pods.items():
            self._life.number[0, service, place] = len(pod.calls) + len(pod.waiting)

    def _follow(self) -> None:
        """Takes over which replicas there are, and how fast each is."""
        life, now = self._life, self.time
        phase, speed = life.phase[0].tolist(), life.speed()[0].tolist()
        zone = life.node_class[0].tolist()
        for at in list(self._pods):
            service, place = at
            if phase[service][place] not in (READY, DRAINING):
                self._lose(self._pods.pop(at))
        for service, phases in enumerate(phase):
            self._ready[service] = []
            for place, one in enumerate(phases):
                if one not in (READY, DRAINING):
                    continue
                pod = self._pods.get((service, place))
                if pod is None:
                    pod = _Pod(service, place, self._cores[service], speed[service][place], now)
                    self._pods[service, place] = pod
                elif pod.speed != speed[service][place]:
                    pod.pass_time(now)
                    pod.speed = speed[service][place]
                    self._expect(pod)
                if one == READY:
                    self._ready[service].append(pod)
            if self._routing is not None:
                weights = [
                    float(self._routing[0, service, zone[service][p.place]]) for p in self._ready[service]
                ]
                self._weights[service] = weights if sum(weights) > 0 else None
            else:
                self._weights[service] = None

    # -- requests --------------------------------------------------------------------------------------------

    def _try(self, attempt: _Attempt) -> None:
        kind = attempt.kind
        self._tried[kind] += 1
        if attempt.tries == 1:
            self._offered[kind] += 1
            self._tokens = min(self._tokens + self.cluster.retry_budget, _AT_ONCE)
        else:
            self._retried += 1
        deadline = attempt.began + float(self.cluster.deadline[kind])
        heappush(self._events, (deadline, next(self._order), 2, attempt, 0))
        self._arrive(_Call(attempt, int(self.cluster.entry[kind]), None, self.time))

    def _failed(self, attempt: _Attempt) -> None:
        """The user gives up on it, and tries again if that is allowed."""
        attempt.over = True
        self._missed[attempt.kind] += 1
        if attempt.tries <= self.cluster.retries and self._tokens >= 1:
            self._tokens -= 1
            heappush(
                self._events,
                (self.time, next(self._order), 0, _Attempt(attempt.kind, self.time, attempt.tries + 1), 0),
            )

    def _answered(self, attempt: _Attempt) -> None:
        latency = self.time - attempt.began
        self._latencies[attempt.kind].append(latency)
        if not attempt.over:
            attempt.over = True
            self._good += 1

    # -- calls -----------------------------------------------------------------------------------------------

    def _arrive(self, call: _Call) -> None:
        service = call.service
        self._arrived[service] += 1
        pod = self._choose(service)
        if pod is None:
            self._fail(call)
        elif len(pod.calls) < self._slots[service]:
            call.pod = pod
            pod.pass_time(self.time)
            self._begin(pod, call)
            self._expect(pod)
        elif len(pod.waiting) < self._limit[service]:
            call.pod = pod
            pod.pass_time(self.time)
            pod.waiting.append(call)
        else:
            self._fail(call)

    def _choose(self, service: int) -> _Pod | None:
        """The balancer's replica for a call."""
        ready, weights = self._ready[service], self._weights[service]
        if not ready:
            return None
        if len(ready) == 1:
            return ready[0]
        balancer = self.cluster.balancer
        if balancer == "round_robin":
            if weights is None:
                self._turn[service] += 1
                return ready[int(self._turn[service]) % len(ready)]
            for pod, weight in zip(ready, weights, strict=True):
                self._credit[pod] = self._credit.get(pod, 0) + weight
            chosen = max(ready, key=lambda pod: self._credit[pod])
            self._credit[chosen] -= sum(weights)
            return chosen
        one = self._any(ready, weights)
        if balancer == "random":
            return one
        other = self._any(ready, weights)
        return min((one, other), key=lambda pod: len(pod.calls) + len(pod.waiting))

    def _any(self, ready: list[_Pod], weights: list[float] | None) -> _Pod:
        at = next(self._uniform)
        if weights is None:
            return ready[int(at * len(ready))]
        at *= sum(weights)
        for pod, weight in zip(ready, weights, strict=True):
            at -= weight
            if at < 0:
                return pod
        return ready[-1]

    def _begin(self, pod: _Pod, call: _Call) -> None:
        pod.calls.add(call)
        need = pod.spent + next(self._demand[call.service])
        heappush(pod.work, (need, next(self._order), call))

    def _expect(self, pod: _Pod) -> None:
        """Foretells when the next call of a replica has its CPU time; what was foretold before is void."""
        pod.version += 1
        if pod.work:
            heappush(self._events, (pod.next_done(), next(self._order), 1, pod, pod.version))

    def _worked(self, pod: _Pod) -> None:
        """A call has its CPU time; now it makes its calls."""
        pod.pass_time(self.time)
        _, _, call = heappop(pod.work)
        pod.served += 1
        for callee, sure, chance in self._edges[call.attempt.kind][call.service]:
            count = sure + (chance > 0 and next(self._uniform) < chance)
            call.todo.extend([callee] * count)
        self._go_on(call)
        self._expect(pod)

    def _go_on(self, call: _Call) -> None:
        if call.todo:
            self._arrive(_Call(call.attempt, call.todo.pop(), call, self.time))
            return
        self._spans[call.service].append(self.time - call.arrived)
        self._leave(call)
        if call.caller is None:
            self._answered(call.attempt)
        elif call.caller.pod is not None:  # else it was lost meanwhile
            self._go_on(call.caller)

    def _leave(self, call: _Call) -> None:
        """Gives up its slot to the next one that waits."""
        pod, call.pod = call.pod, None
        assert pod is not None
        pod.calls.remove(call)
        if pod.waiting:
            pod.pass_time(self.time)
            self._begin(pod, pod.waiting.popleft())
            self._expect(pod)

    def _fail(self, call: _Call) -> None:
        """A call that was refused or lost fails its caller, and so on up to the request."""
        self._errors[call.service] += 1
        caller = call.caller
        while caller is not None:
            if caller.pod is None:
                return  # was lost before, and has failed the request
            self._leave(caller)
            caller = caller.caller
        if not call.attempt.over:
            self._failed(call.attempt)

    def _lose(self, pod: _Pod) -> None:
        pod.version += 1
        lost = [*pod.calls, *pod.waiting]
        pod.calls.clear()
        pod.waiting.clear()
        pod.work.clear()
        for call in lost:
            call.pod = None
        for call in lost:
            self._fail(call)
        self._cpu_gone += pod.cpu
        self._held_gone[pod.service] += pod.own

    # -- what is counted -------------------------------------------------------------------------------------

    def _clear(self) -> None:
        services, classes = len(self.cluster.names), len(self.cluster.entry)
        self._arrived, self._errors = [0] * services, [0] * services
        self._queue, self._held_gone = [0.0] * services, [0.0] * services
        self._spans: list[list[float]] = [[] for _ in range(services)]
        self._latencies: list[list[float]] = [[] for _ in range(classes)]
        self._offered, self._tried, self._missed = [0] * classes, [0] * classes, [0] * classes
        self._good = self._retried = 0
        self._allocated = self._replica_seconds = self._node_seconds = self._cpu_gone = 0.0
        for pod in self._pods.values():
            pod.cpu = pod.own = pod.served = 0.0

    def _outcome(self, seconds: float) -> Outcome:
        latencies = np.concatenate([np.array(of) for of in self._latencies])
        edges = np.concatenate([[0], LATENCY_BOUNDS.numpy(), [np.inf]])
        values: dict[str, float] = {
            "seconds": seconds,
            "offered": sum(self._offered),
            "answered": len(latencies),
            "good": self._good,
            "failed": sum(self._missed),
            "retried": self._retried,
            "latency": latencies.sum(),
            "cpu_used": self._cpu_gone + sum(pod.cpu for pod in self._pods.values()),
            "cpu_allocated": self._allocated,
            "replica_seconds": self._replica_seconds,
            "node_seconds": self._node_seconds,
            "changes": float(self._life.changes),
            "restarts": float(self._life.restarts),
        }
        held = torch.tensor(self._held_gone)
        for pod in self._pods.values():
            held[pod.service] += pod.own
        assert {*values, "held", "latencies"} == {field.name for field in fields(Outcome)}
        return Outcome(
            **{name: torch.tensor([float(value)]) for name, value in values.items()},
            held=held.unsqueeze(0),
            latencies=torch.from_numpy(np.histogram(latencies, edges)[0]).float().unsqueeze(0),
        )

    def _measured(self, interval: float) -> Measurement:
        def by_service(values: list[float] | list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).unsqueeze(0)

        def quantile(values: list[list[float]], q: float) -> Tensor:
            return by_service([float(np.quantile(one, q)) if one else math.nan for one in values])

        cores, own, served = torch.zeros(3, *self._life.timer.shape).unbind()
        for (service, place), pod in self._pods.items():
            at = (0, service, place)
            cores[at], own[at], served[at] = pod.cpu, pod.own, pod.served
        return Measurement(
            rate=by_service(self._arrived) / interval,
            latency_p50=quantile(self._spans, 0.5),
            latency_p95=quantile(self._spans, 0.95),
            queue=by_service(self._queue) / interval,
            errors=by_service(self._errors) / interval,
            cores=cores / interval,
            own=own / interval,
            served=served / interval,
            offered=by_service(self._offered) / interval,
            request_p95=quantile(self._latencies, 0.95),
            missed=by_service(self._missed) / by_service(self._tried),
        )

    def _truth(self) -> Truth:
        visits = torch.as_tensor(self.cluster.visits, dtype=torch.float32)
        queue = [0] * len(self.cluster.names)
        for pod in self._pods.values():
            queue[pod.service] += len(pod.calls) + len(pod.waiting)
        return Truth(
            rate=self.traffic.at(self.time) @ visits,
            queue=torch.tensor(queue).float().unsqueeze(0),
            ahead=self.traffic.ahead(self.time, self.cluster.measure.interval, AHEAD) @ visits,
        )

    # -- chance ----------------------------------------------------------------------------------------------

    def _lognormal(self, mean: float, sigma: float) -> Iterator[float]:
        while True:
            yield from self._random.lognormal(math.log(mean) - sigma**2 / 2, sigma, _BLOCK).tolist()

    def _uniforms(self) -> Iterator[float]:
        while True:
            yield from self._random.random(_BLOCK).tolist()
