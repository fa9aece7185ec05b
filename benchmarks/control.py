"""The simulator of the control room: is it right, and is it fast?

`validation` runs both engines beside closed forms, and beside each other on clusters at rest, in a change of
load, and with faults. `speed` times both, against the goal that 64 environments of 25 services go 50 times
faster than real time. `balancers` fits the constants of the less busy of two to the event-driven engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from fleetcast.control import queueing, traffic
from fleetcast.control.cluster import Balancer, Cluster, ClusterOptions, FaultOptions, chain, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.events import EventEngine
from fleetcast.control.interface import Action, Engine, Observation, Outcome, run, total
from fleetcast.control.traffic import Traffic, TrafficOptions
from fleetcast.errors import InputError
from pydantic import Field
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks.report import BenchConfig, machine, spread_of, table
from benchmarks.report import run as run_benchmark

Part = Literal["validation", "speed", "balancers"]
_NO_FAULTS = FaultOptions(crash_rate=0, leak_rate=0, slow_rate=0)
#: How many times faster than real time 64 environments of 25 services shall go.
_GOAL = 50
#: Numbers that make up the state of a replica (phase, timer, node, memory, leak, calls, utilisation), and
#: powers that its law takes in a step.
_STATE, _POWERS = 7, 3
#: Intervals before a cluster at rest counts as settled.
_SETTLES = 4


class Config(BenchConfig):
    __doc__ = __doc__

    parts: tuple[Part, ...] = ("validation", "speed")
    """Which parts to run."""
    threads: int = Field(1, ge=1)
    """Threads of torch. Its tensors are small here: a second thread costs more than it brings."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the vectorised engine's `speed` is measured: cpu or cuda."""
    calls: int = Field(150_000, ge=1000)
    """About as many calls the event-driven engine simulates in each case of a validation."""


class _Keep:
    """The same replicas all the time."""

    def reset(self, cluster: Cluster, environments: int) -> None:
        self._replicas = torch.as_tensor(cluster.initial).float().repeat(environments, 1)

    def act(self, observation: Observation) -> Action:
        return Action(self._replicas)


class _Target:
    """Replicas for a CPU use of 60 %, by what was measured last."""

    def reset(self, cluster: Cluster, environments: int) -> None: ...

    def act(self, observation: Observation) -> Action:
        wanted = (observation.ready * observation.cpu / 0.6).ceil()
        return Action(torch.where(wanted.isnan(), observation.wanted, wanted))


def main(config: Config) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is no GPU that torch can use, expected cpu")
    torch.set_num_threads(config.threads)
    for part in config.parts:
        _PARTS[part](config)


# -- closed forms --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    name: str
    cluster: Cluster
    rate: float
    mean: float
    """By the closed form [s]."""


def _cases() -> Iterator[_Case]:
    for busy in (0.5, 0.8, 0.9):
        yield _Case(
            f"M/G/1-PS, ρ {busy}, cv 1",
            chain([0.1]),
            busy / 0.1,
            queueing.ps_response(busy / 0.1, 0.1),
        )
    yield _Case("M/G/1-PS, ρ 0.8, cv 2", chain([0.1], cv=2), 8, queueing.ps_response(8, 0.1))
    for busy, cv in ((0.5, 1), (0.8, 0.5), (0.6, 2)):
        wait = queueing.allen_cunneen_wait(1, busy / 0.1, 0.1, 1, cv**2)
        yield _Case(f"M/G/1-FCFS, ρ {busy}, cv {cv}", chain([0.1], cv=cv, slots=1), busy / 0.1, 0.1 + wait)
    for cores, busy in ((2, 0.7), (4, 0.8), (16, 0.9)):
        rate = busy * cores / 0.1
        yield _Case(
            f"{cores} cores shared, ρ {busy} (Erlang C)",
            chain([0.1], cores=cores),
            rate,
            0.1 + queueing.mmc_wait(cores, rate, 0.1),
        )
    yield _Case("4 replicas at random, ρ 0.8", chain([0.1], replicas=4), 32, queueing.ps_response(8, 0.1))
    demands = [0.02, 0.05, 0.03]
    yield _Case(
        "3 services in a row, λ 15/s",
        chain(demands),
        15,
        sum(queueing.ps_response(15, one) for one in demands),
    )


def _settled(make: Callable[[], Engine], intervals: int) -> Outcome:
    return total(run(make(), _Keep(), _SETTLES + intervals)[_SETTLES:])


def _intervals(cluster: Cluster, rate: float, calls: int) -> int:
    """How many intervals hold so many calls."""
    return max(10, math.ceil(calls / (rate * float((cluster.share @ cluster.visits).sum()) * 15)))


def _mean(outcome: Outcome) -> float:
    return float(outcome.latency.sum() / outcome.answered.sum())


def _off(value: float, expected: float) -> str:
    return f"{100 * (value / expected - 1):+.1f} %"


def _closed_forms(config: Config) -> None:
    rows = []
    for case in _cases():
        rates = traffic.constant(case.rate, seconds=5)
        count = _intervals(case.cluster, case.rate, config.calls)
        events = _mean(_settled(lambda c=case, r=rates: EventEngine(c.cluster, r), count))  # type: ignore[misc]
        fluid = _mean(_settled(lambda c=case, r=rates: FluidEngine(c.cluster, r), 40))  # type: ignore[misc]
        rows.append(
            (
                case.name,
                f"{1e3 * case.mean:.1f}",
                f"{1e3 * events:.1f}",
                _off(events, case.mean),
                f"{1e3 * fluid:.1f}",
                _off(fluid, case.mean),
            )
        )
    table(
        "Mean response time against closed forms [ms]",
        ("case", "closed form", "event-driven", "off by", "vectorised", "off by"),
        rows,
        f"About {config.calls:,} calls each in the event-driven engine.",
    )


def _overload(config: Config) -> None:
    """120 calls/s at 100/s for 60 s, then a second replica that takes 20 s to start."""
    cluster = chain([0.01], max_replicas=2)
    cluster = replace(cluster, life=cluster.life.model_copy(update={"start_sigma": 0.0}))
    rows = []
    engines: tuple[Engine, ...] = (
        EventEngine(cluster, traffic.constant(120, seconds=5)),
        FluidEngine(cluster, traffic.constant(120, seconds=5)),
    )
    backlogs: list[list[float]] = []
    for engine in engines:
        backlogs.append([])
        for interval in range(8):
            engine.step(Action(torch.tensor([[1.0 if interval < 4 else 2.0]])))
            truth = engine.observe(truth=True).truth
            assert truth is not None
            backlogs[-1].append(float(truth.queue))
    for interval in range(8):
        now = 15 * (interval + 1)
        # The replica is asked for at 60 s, finds its node within a second, and is ready 20 s later. It gets
        # half of the calls, and the other one works off what has come to it.
        grown = queueing.fluid_backlog(120, 100, min(now, 81))
        expected = max(0.0, grown - max(0, now - 81) * (100 - 60))
        rows.append((f"{now} s", f"{expected:.0f}", *(f"{one[interval]:.0f}" for one in backlogs)))
    table(
        "Calls in a service that gets 120/s and can do 100/s; a second replica is asked for at 60 s",
        ("time", "fluid limit", "event-driven", "vectorised"),
        rows,
        "The fluid limit has no random queue; of the event-driven engine this is one run.",
    )


# -- each other ----------------------------------------------------------------------------------------------


def _steady(cluster: Cluster, level: float) -> Traffic:
    return Traffic(torch.tensor(cluster.share * cluster.rate * level).float().reshape(1, 1, -1), 5)


def _compared(name: str, events: Outcome, fluid: Outcome) -> tuple[str, ...]:
    def ratio(of: Callable[[Outcome], float]) -> str:
        return _off(of(fluid), of(events)) if of(events) else "–"

    def quantile(q: float) -> Callable[[Outcome], float]:
        return lambda outcome: float(_pooled(outcome).quantile(q))

    return (
        name,
        f"{1e3 * _mean(events):.1f}",
        ratio(_mean),
        ratio(quantile(0.5)),
        ratio(quantile(0.95)),
        ratio(quantile(0.99)),
        ratio(lambda one: float(one.answered.sum() / one.seconds.sum())),
        f"{float(events.good.sum() / events.offered.sum()):.3f}",
        f"{float(fluid.good.sum() / fluid.offered.sum()):.3f}",
        ratio(lambda one: float(one.cpu_used.sum() / one.seconds.sum())),
        ratio(lambda one: float(one.replica_seconds.sum() / one.seconds.sum())),
    )


def _pooled(outcome: Outcome) -> Outcome:
    """All environments as one."""
    return Outcome(*(value.sum(0, keepdim=True) for value in vars(outcome).values()))


_COMPARED = (
    "cluster", "mean, events [ms]", "mean", "p50", "p95", "p99", "answered/s", "in time, events",
    "in time, vectorised", "CPU", "replicas",
)  # fmt: skip


def _at_rest(config: Config) -> None:
    rows = []
    cases: tuple[tuple[int, Balancer, float], ...] = (
        (0, "p2c", 0.5), (0, "p2c", 1.0), (0, "random", 0.8), (0, "round_robin", 0.8),
        (1, "p2c", 1.0), (2, "p2c", 1.2), (3, "p2c", 1.0), (1, "p2c", 2.0), (2, "p2c", 3.0),
    )  # fmt: skip
    for seed, balancer, level in cases:
        options = ClusterOptions(
            services=12, rate=300, balancer=balancer, min_replicas=1, faults=_NO_FAULTS, seed=seed
        )
        cluster = generate(options)
        rates = _steady(cluster, level)
        count = _intervals(cluster, cluster.rate * level, config.calls)
        events = _settled(lambda c=cluster, r=rates: EventEngine(c, r), count)  # type: ignore[misc]
        fluid = _settled(lambda c=cluster, r=rates: FluidEngine(c, r), 20)  # type: ignore[misc]
        rows.append(_compared(f"{seed}, {balancer}, {level:g} × its rate", events, fluid))
    table(
        "Clusters of 12 services at rest: the vectorised engine against the event-driven one",
        _COMPARED,
        rows,
    )


def _in_motion(config: Config) -> None:
    """With a rule that scales, cold replicas, crashes, leaks, slow nodes and bursts of requests."""
    _scaled(ClusterOptions(services=12, rate=50, min_replicas=2), "replicas to spare", 6)
    _scaled(ClusterOptions(services=12, rate=150, min_replicas=1), "none to spare", 4)


def _scaled(options: ClusterOptions, room: str, with_faults: int) -> None:
    rows = []
    faults = FaultOptions(crash_rate=0.5, leak_rate=0.5, slow_rate=0.5)
    cases: tuple[tuple[str, traffic.Pattern, FaultOptions, int, int], ...] = (
        ("wave", "sine", _NO_FAULTS, 2, 2), ("bursts", "bursts", _NO_FAULTS, 2, 2),
        ("flash crowd", "flash_crowd", _NO_FAULTS, 2, 2),
        ("wave, many faults", "sine", faults, with_faults, 60),
    )  # fmt: skip
    for name, pattern, fails, of_events, of_fluid in cases:
        cluster = generate(options.model_copy(update={"faults": fails}))
        requests = TrafficOptions(patterns=(pattern,), hours=0.5, period=0.5)
        rates = traffic.generate(requests, cluster, of_events)
        intervals = round(requests.hours * 3600 / cluster.measure.interval)
        alone = [
            total(run(EventEngine(cluster, Traffic(rates.rates[n : n + 1], 5), seed=n), _Target(), intervals))
            for n in range(of_events)
        ]
        events = Outcome(*(torch.cat(of) for of in zip(*(vars(one).values() for one in alone), strict=True)))
        again = Traffic(rates.rates.repeat(of_fluid // of_events, 1, 1), rates.step)
        fluid = total(run(FluidEngine(cluster, again), _Target(), intervals))
        rows.append(_compared(name, events, fluid))
    table(
        f"Clusters of 12 services in motion, scaled by a rule, {room}, for half an hour",
        _COMPARED,
        rows,
        f"Two runs each; with faults {with_faults} and 60. Start-up times, faults and lost measurements are "
        "drawn anew in each engine.",
    )


def validation(config: Config) -> None:
    for part in (_closed_forms, _overload, _at_rest, _in_motion):
        part(config)


# -- speed ---------------------------------------------------------------------------------------------------


def speed(config: Config) -> None:
    sizes = ((25, 16), (25, 64), (25, 256), (100, 64), (200, 64), (500, 64))
    rows, reached = [], ""
    for services, environments in sizes:
        cluster = generate(ClusterOptions(services=services))
        rates = traffic.generate(TrafficOptions(hours=0.5), cluster, environments)
        engine = FluidEngine(cluster, rates, device=config.device)
        seconds = [_pace(engine, 2) for _ in range(config.repetitions)]
        factor = [cluster.measure.interval / one for one in seconds]
        if (services, environments) == (25, 64):
            reached = "reached" if np.median(factor) >= _GOAL else "NOT reached"
        each = [1e6 * one / cluster.measure.interval / services / environments for one in seconds]
        least = 1 / _least(engine, config.device)
        rows.append((f"{services} × {environments}", spread_of(factor, 0), spread_of(each), f"{least:,.0f}"))
    table(
        "The vectorised engine, steps of 1 s, scaled by a rule",
        (
            "services × environments",
            "times real time",
            "µs per service, environment and second",
            "floor, times real time",
        ),
        rows,
        "The floor of a step: the state of all replicas read and written once, and the three powers that the "
        f"law of a replica takes, as torch does them here. "
        f"Goal: {_GOAL} times real time at 25 × 64: {reached}. {config.threads} thread(s), "
        f"on {_named(config.device)}. {machine()}.",
    )
    paces = []
    for services, rate in ((25, 100.0), (25, 1000.0), (100, 100.0)):
        cluster = generate(ClusterOptions(services=services, rate=rate))
        events = EventEngine(cluster, _steady(cluster, 1))
        seconds = [_pace(events, 3) for _ in range(config.repetitions)]
        calls = rate * float((cluster.share @ cluster.visits).sum()) * cluster.measure.interval
        paces.append(
            (
                f"{services} services, {rate:.0f} requests/s",
                spread_of([cluster.measure.interval / one for one in seconds], 1),
                spread_of([calls / one for one in seconds], 0),
            )
        )
    table("The event-driven engine", ("cluster", "times real time", "calls per second of computing"), paces)


def _named(device: str) -> str:
    return torch.cuda.get_device_name(device) if device == "cuda" else device


def _clock() -> float:
    """Seconds, when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _least(engine: FluidEngine, device: str) -> float:
    """Seconds of the least that a step can be made of."""
    shape = (engine.environments, len(engine.cluster.names), int(engine.cluster.max_replicas.max()))
    state = [torch.rand(shape, device=device) for _ in range(_STATE)]
    powers = torch.rand(shape, device=device)
    start, count = _clock(), 50
    for _ in range(count):
        for one in state:
            one += 1
        for _ in range(_POWERS):
            powers = powers**1.1
    return (_clock() - start) / count


def _pace(engine: Engine, least: float) -> float:
    """Seconds of computing per interval, over at least so many seconds."""
    policy = _Target()
    start, count = _clock(), 0
    while time.perf_counter() - start < least:
        engine.step(policy.act(engine.observe()))
        count += 1
    return (_clock() - start) / count


# -- constants -----------------------------------------------------------------------------------------------


def balancers(config: Config) -> None:
    """κ of the less busy of two: 1/κ = …, by the mean response of the event-driven engine."""
    found = []
    for cores in (1, 2, 4):
        for replicas in (2, 4, 8, 16):
            for busy in (0.5, 0.7, 0.8, 0.9):
                rate = busy * cores * replicas / 0.1
                cluster = chain([0.1], cores=cores, replicas=replicas, balancer="p2c")
                rates = traffic.constant(rate, seconds=5)
                count = _intervals(cluster, rate, config.calls // 8)
                mean = _mean(_settled(lambda c=cluster, r=rates: EventEngine(c, r), count))  # type: ignore[misc]
                found.append((cores, replicas, busy, mean / 0.1))
    cores_, replicas_, busy_, stretch = (torch.tensor(of).double() for of in zip(*found, strict=True))

    def law(constants: np.ndarray) -> Tensor:
        least, fall = constants
        factor = least + (1 - least) * replicas_**-fall
        return 1 + factor * busy_ ** ((2 * (cores_ + 1)).sqrt() - 1) / (cores_ * (1 - busy_))

    fit = least_squares(lambda constants: (law(constants) / stretch).log().numpy(), (0.2, 1.0))
    off = law(fit.x) / stretch - 1
    table(
        "The less busy of two among c replicas: κ = least + (1 − least) c^−fall",
        ("least", "fall", "response off by, root mean square", "most"),
        [(f"{fit.x[0]:.2f}", f"{fit.x[1]:.2f}", f"{100 * float(off.pow(2).mean().sqrt()):.1f} %",
          f"{100 * float(off.abs().max()):.1f} %")],
        "1, 2 and 4 cores, 2 to 16 replicas, ρ from 0.5 to 0.9.",
    )  # fmt: skip


_PARTS: dict[Part, Callable[[Config], None]] = {
    "validation": validation,
    "speed": speed,
    "balancers": balancers,
}

if __name__ == "__main__":
    run_benchmark(main, Config)
