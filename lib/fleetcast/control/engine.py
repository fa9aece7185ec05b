"""The vectorised engine: many environments at once, in steps of a second or a few.

Calls are a fluid: each replica holds a number of them, and works on them by the law of `stations`. Times
along the call graph are sums of the services' means and variances (`paths`); the latency of a request is
taken as lognormal with these moments. Replicas and nodes live as in `pods`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import LATENCY_BOUNDS, Action, Observation, Outcome, Truth
from fleetcast.control.measuring import Measurement, Measuring
from fleetcast.control.paths import Paths, Spans
from fleetcast.control.pods import DRAINING, STARTING, Pods
from fleetcast.control.stations import advance, shape
from fleetcast.control.traffic import AHEAD, Traffic
from fleetcast.errors import InputError

#: How fast the less busy of two evens out the calls of replicas [s].
_EVEN_OUT = 2.0
#: Over how long Little's law takes the pace of a service [s].
_PACE = 3.0
#: A rate that counts as none [1/s].
_NONE = 1e-4
#: The utilisation up to which a queue counts as random, not as left over.
_SETTLED = 0.98
_NORMAL_P95 = 1.6449


@dataclass
class _Sums:
    """Of one interval, times seconds unless said otherwise."""

    rate: Tensor
    queue: Tensor
    errors: Tensor
    span: Tensor
    """[E, S]. Of mean span and rate; likewise its second moment."""
    square: Tensor
    cpu: Tensor
    """[E, S, R]. Cores in use."""
    own: Tensor
    """[E, S, R]. Calls in a replica, and calls served [1/s]."""
    served: Tensor
    offered: Tensor
    """[E, K]."""
    tried: Tensor
    missed: Tensor
    answered: Tensor
    latency: Tensor
    latency_square: Tensor

    def __init__(
        self, environments: int, services: int, places: int, classes: int, device: torch.device
    ) -> None:
        for field in fields(self):
            shape: tuple[int, ...] = (environments, services)
            match field.name:
                case "cpu" | "own" | "served":
                    shape = (*shape, places)
                case "offered" | "tried" | "missed" | "answered" | "latency" | "latency_square":
                    shape = (environments, classes)
            setattr(self, field.name, torch.zeros(shape, device=device))


class FluidEngine:
    """Environments side by side, each with its own traffic; `step` is the time of one step [s].

    The same arguments, the same run.
    """

    def __init__(
        self,
        cluster: Cluster,
        traffic: Traffic,
        *,
        step: float = 1.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        steps = cluster.measure.interval / step
        if abs(steps - round(steps)) > 1e-9 or steps < 1:
            raise InputError(f"a step of {step} s, expected a whole part of {cluster.measure.interval} s")
        if traffic.rates.shape[2] != len(cluster.entry):
            raise InputError(
                f"traffic of {traffic.rates.shape[2]} classes, expected the cluster's {len(cluster.entry)}"
            )
        self.cluster, self.traffic = cluster, traffic
        self.environments = traffic.rates.shape[0]
        self.time = 0.0
        self._step, self._steps, self._device = step, round(steps), torch.device(device)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._pods = Pods(cluster, self.environments, self._generator, self._device)
        self._paths = Paths(cluster, self._device)

        def along(values: object) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=self._device)

        self._demand = along(cluster.demand).unsqueeze(1)
        self._cores = along(cluster.cores).unsqueeze(1)
        self._slots = along(cluster.slots).unsqueeze(1)
        self._room = along(cluster.slots + cluster.queue_limit).unsqueeze(1)
        self._scv = along(cluster.demand_cv**2).unsqueeze(1)
        self._deadline = along(cluster.deadline)
        self._visits = along(cluster.visits)
        self._bounds = LATENCY_BOUNDS.log().to(self._device)

        environments, services = self.environments, len(cluster.names)
        self._busy = torch.zeros_like(self._pods.timer)
        self._rate = torch.zeros(environments, services, device=self._device)
        self._passed = torch.ones_like(self._rate)
        self._flows = self._visits.T.unsqueeze(1).repeat(1, environments, 1)
        """[S, E, K]. Calls per second by class, of the last step."""
        self._below = torch.zeros_like(self._rate)
        """Time that a call spends in calls of its own [s]."""
        self._pace = torch.zeros_like(self._rate)
        """Calls served, over the last seconds [1/s]."""
        self._lost = torch.zeros_like(self._rate)
        self._again = torch.zeros_like(traffic.rates[:, 0], device=self._device)
        """Attempts after the first [1/s]."""
        self._routing: Tensor | None = None
        self._measuring = Measuring(cluster, self._pods, self._generator)

    # -- what a policy deals with ----------------------------------------------------------------------------

    def step(self, action: Action) -> Outcome:
        """Lets one decision interval pass."""
        pods = self._pods
        pods.changes.zero_()
        pods.restarts.zero_()
        if action.restart is not None:
            pods.restart(action.restart.to(self._device))
        pods.scale(action.replicas.to(self._device))
        self._routing = action.routing
        environments, services, places = pods.timer.shape
        sums = _Sums(environments, services, places, len(self._deadline), self._device)
        zero = torch.zeros(self.environments, device=self._device)
        outcome = Outcome(
            **{f.name: zero.clone() for f in fields(Outcome) if f.name not in ("latencies", "held")},
            held=torch.zeros(environments, services, device=self._device),
            latencies=torch.zeros(self.environments, len(LATENCY_BOUNDS) + 1, device=self._device),
        )
        self._lost += pods.fail(self.cluster.measure.interval)
        for _ in range(self._steps):
            self._advance(sums, outcome)
        outcome.changes.add_(pods.changes)
        outcome.restarts.add_(pods.restarts)
        outcome.held.add_(sums.own.sum(2))
        self._measuring.record(self._measured(sums))
        return outcome

    def observe(self, truth: bool = False) -> Observation:
        """What there is to see now; `truth` adds what no autoscaler can see."""
        return self._measuring.observe(self.time, self._truth() if truth else None)

    # -- a step ----------------------------------------------------------------------------------------------

    def _advance(self, sums: _Sums, outcome: Outcome) -> None:
        step, pods, cluster = self._step, self._pods, self.cluster
        offered = self.traffic.at(self.time).to(self._device)
        requests = offered + self._again
        ready = pods.ready
        capacity, alone = self._capacity(ready | (pods.phase == DRAINING))
        most = self._throttle(requests, capacity, ready)
        passed = torch.where(most.isinf(), self._passed, most / self._rate.clamp(min=_NONE)).clamp(max=10)
        self._flows = flows = self._paths.flows(requests, passed.T)
        rate = flows.sum(2).T
        capacity = capacity * (most / capacity.sum(2).clamp(min=_NONE)).clamp(max=1).unsqueeze(2)
        share = self._shares(ready, capacity, rate)
        replicas = ready.sum(2, keepdim=True)
        factor, exponent = shape(
            cluster.balancer, self._cores.clamp(min=1), replicas, self._slots, self._scv, self._busy
        )
        arrivals = rate.unsqueeze(2) * share
        number, self._busy = advance(
            pods.number, arrivals, capacity, self._cores.clamp(min=1), factor, exponent, self._busy, step
        )
        served = capacity * self._busy
        excess = (number - self._room).clamp(min=0)
        pods.number = number - excess

        total, through = pods.number.sum(2), served.sum(2)
        refused = excess.sum(2) / step + torch.where(replicas.squeeze(2) > 0, 0.0, rate)
        errors = refused + self._lost / step
        hazard = -torch.log1p(-(errors / (rate + _NONE)).clamp(max=0.999))
        mean, variance = self._response(total, through, served, alone, replicas.squeeze(2), rate, capacity)
        spans = self._paths.spans(mean.T, variance.T, hazard.T)
        self._passed = torch.where(rate > _NONE, through / rate.clamp(min=_NONE), 1.0).clamp(max=10)
        self._rate = rate

        mix = flows / (flows.sum(2, keepdim=True) + _NONE)
        span = (mix * spans.mean).sum(2).T
        self._below = (span - mean).clamp(min=0) * (rate > _NONE)

        self._count(sums, outcome, offered, requests, spans)
        sums.rate += step * rate
        sums.queue += step * (total + through * self._below)
        sums.errors += step * errors
        sums.span += step * rate * span
        sums.square += step * rate * (mix * (spans.variance + spans.mean**2)).sum(2).T
        used = served * alone * self._cores.clamp(max=1)
        sums.cpu += step * used
        sums.own += step * pods.number
        sums.served += step * served
        outcome.cpu_used.add_(step * used.sum((1, 2)))
        on_node = pods.on_node
        outcome.cpu_allocated.add_(step * (on_node * self._cores).sum((1, 2)))
        outcome.replica_seconds.add_(step * on_node.sum((1, 2)))
        outcome.node_seconds.add_(step * pods.there.sum(1))

        self.time += step
        self._lost = pods.pass_time(step)
        self._busy *= pods.phase >= STARTING

    def _throttle(self, requests: Tensor, capacity: Tensor, ready: Tensor) -> Tensor:
        """[E, S]. Calls per second that a service can finish at most, for the sake of those that it calls."""
        number, replicas = self._pods.number.sum(2), ready.sum(2)
        # Without a replica calls are refused at once, and hold up nobody.
        whole = torch.where(replicas > 0, capacity.sum(2), torch.inf)
        held = number + self._pace * self._below
        slots = self._slots.squeeze(1) * replicas
        return self._paths.throttle(
            requests, self._flows, whole.T, number.T, held.T, slots.T.float(), self._step
        ).T

    def _capacity(self, works: Tensor) -> tuple[Tensor, Tensor]:
        """[E, S, R]. Calls per second that a replica can work on, and the time of one that is alone there."""
        alone = self._demand / (self._pods.speed() * self._cores.clamp(max=1))
        return self._cores.clamp(min=1) / alone * works, alone

    def _shares(self, ready: Tensor, capacity: Tensor, rate: Tensor) -> Tensor:
        """[E, S, R]. How the balancer spreads calls over ready replicas."""
        weight = ready.float()
        if self._routing is not None:
            routing = self._routing.to(weight).clamp(min=0)
            routing = torch.where(routing.sum(2, keepdim=True) > 0, routing, 1.0)
            weight = weight * routing.gather(2, self._pods.node_class)
        if self.cluster.balancer == "p2c":
            # Idle ones get alike, busy ones what they can work off; less where more waits than elsewhere.
            number, can = self._pods.number, capacity * ready
            count, whole = ready.sum(2, keepdim=True).clamp(min=1), can.sum(2, keepdim=True)
            busy = (rate.unsqueeze(2) / whole.clamp(min=_NONE)).clamp(max=1)
            fair = can * busy + whole / count * (1 - busy)
            even = (number * ready).sum(2, keepdim=True) / count
            weight = weight * (fair * busy - (number - even) / _EVEN_OUT).clamp(min=_NONE)
        return weight / weight.sum(2, keepdim=True).clamp(min=1e-12)

    def _response(
        self,
        total: Tensor,
        through: Tensor,
        served: Tensor,
        alone: Tensor,
        replicas: Tensor,
        rate: Tensor,
        capacity: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[E, S]. Mean and variance of a call's time in a service itself [s].

        The mean is Little's law. What waits for a slot and what shares the cores vary differently, and what
        an overload has left over does not vary: all that come together wait alike.
        """
        fade = math.exp(-self._step / _PACE)
        self._pace += (1 - fade if self.time else 1) * (through - self._pace)
        some = self._pace + _NONE
        own = ((served * alone).sum(2) + _NONE * alone.mean(2)) / (through + _NONE)
        mean = (total + _NONE * own) / some
        held = total / replicas.clamp(min=1)
        in_line = (held / (1 + held)) ** self._slots.T
        line = mean * in_line
        work = mean - line
        shared = ((work - own) / work).clamp(0, 1) * (1 - in_line)
        busy = (rate / capacity.sum(2).clamp(min=_NONE)).clamp(max=_SETTLED)
        settled = self._cores.T * busy + busy**2 / (1 - busy)
        random = (settled * replicas / total.clamp(min=_NONE)).clamp(max=1) ** 2
        variance = work**2 * (self._scv.T + 2 * shared / (2 - shared) * random)
        variance = variance + line**2 * (2 / in_line.clamp(min=1e-6) - 1) * random
        apart = (
            served * (self._pods.number / (served + _NONE) - (total / (through + _NONE)).unsqueeze(2)) ** 2
        )
        return mean, variance + apart.sum(2) / (through + _NONE)

    def _count(self, sums: _Sums, outcome: Outcome, offered: Tensor, requests: Tensor, spans: Spans) -> None:
        """What comes of the requests of a step; sets how many are tried again in the next."""
        step, paths = self._step, self._paths
        mean, variance = paths.of_requests(spans.mean), paths.of_requests(spans.variance)
        answered = requests * (-paths.of_requests(spans.hazard)).exp()
        scale = torch.log1p(variance / mean.clamp(min=1e-9) ** 2).clamp(min=1e-6)
        middle, scale = mean.clamp(min=1e-9).log() - scale / 2, scale.sqrt()
        in_time = _normal((self._deadline.log() - middle) / scale)
        good = answered * in_time
        fails = 1 - (good / requests.clamp(min=_NONE)).clamp(0, 1) * (requests > 0)

        tries = sum((fails**n for n in range(1, self.cluster.retries + 1)), torch.zeros_like(fails))
        self._again = offered * tries.clamp(max=self.cluster.retry_budget)
        outcome.seconds.add_(step)
        outcome.offered.add_(step * offered.sum(1))
        outcome.retried.add_(step * (requests - offered).sum(1))
        outcome.answered.add_(step * answered.sum(1))
        outcome.good.add_(step * good.sum(1))
        outcome.failed.add_(step * (requests - good).sum(1))
        outcome.latency.add_(step * (answered * mean).sum(1))
        below = _normal((self._bounds - middle.unsqueeze(2)) / scale.unsqueeze(2))
        below = (answered.unsqueeze(2) * below).sum(1)
        ends = (torch.zeros_like(below[:, :1]), below, answered.sum(1, keepdim=True))
        outcome.latencies.add_(step * torch.cat(ends, 1).diff(dim=1))
        sums.offered += step * offered
        sums.tried += step * requests
        sums.missed += step * (requests - good)
        sums.answered += step * answered
        sums.latency += step * answered * mean
        sums.latency_square += step * answered * (variance + mean**2)

    # -- what is seen ----------------------------------------------------------------------------------------

    def _measured(self, sums: _Sums) -> Measurement:
        interval = self.cluster.measure.interval
        p50, p95 = _quantiles(sums.span / sums.rate, sums.square / sums.rate)
        _, request_p95 = _quantiles(sums.latency / sums.answered, sums.latency_square / sums.answered)
        return Measurement(
            rate=self._counted(sums.rate) / interval,
            latency_p50=p50,
            latency_p95=p95,
            queue=sums.queue / interval,
            errors=self._counted(sums.errors) / interval,
            cores=sums.cpu / interval,
            own=sums.own / interval,
            served=sums.served / interval,
            offered=self._counted(sums.offered) / interval,
            request_p95=request_p95,
            missed=sums.missed / sums.tried,
        )

    def _counted(self, count: Tensor) -> Tensor:
        """As many as really came, where so many are expected."""
        return torch.poisson(count, generator=self._generator)

    def _truth(self) -> Truth:
        interval = self.cluster.measure.interval
        ahead = self.traffic.ahead(self.time, interval, AHEAD).to(self._device) @ self._visits
        queue = self._pods.number.sum(2) + self._rate * self._below
        return Truth(rate=self._rate.clone(), queue=queue, ahead=ahead)


def _quantiles(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Median and 95th percentile of lognormal distributions, by their first two moments."""
    scale = torch.log1p((square / mean**2 - 1).clamp(min=0))
    middle = mean.log() - scale / 2
    return middle.exp(), (middle + _NORMAL_P95 * scale.sqrt()).exp()


def _normal(value: Tensor) -> Tensor:
    """The standard normal distribution function."""
    return torch.special.ndtr(value)
