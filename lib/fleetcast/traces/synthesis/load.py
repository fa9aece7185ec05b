"""The load: cpu = level + daily and weekly cycle + shock + bursts, drawn at knots five minutes apart.

The cycle is a little more than half of the variance of a machine's 15-min means, so tomorrow resembles today
and weekends are lower. Most of the rest is the shock, hours long, of which yesterday says nothing but the
upstream services do. With c = coupling, r the share that travels and n upstream services, each one delay ago:

    shock of a service  ∝  √(1 − r) · own + √(r / n) · Σ shocks of its upstream services
    shared shock        ∝  Σ √share · shock of a service that the machine hosts
    shock of a machine  =  √(1 − c) · private + √c · shared

All of them have unit variance, so coupling changes where load comes from, not how much it varies: at 1 the
past of the upstream machines tells the next hour of a machine, at 0 it tells nothing, though the records show
the same dependencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache, partial

import numpy as np
from scipy.signal import fftconvolve
from scipy.signal.windows import hann

from fleetcast.traces.synthesis.cluster import (
    DAY,
    DELAYS,
    KNOT,
    KNOTS,
    LAYERS,
    SHARD,
    Array,
    Shares,
    Stream,
    SynthesizeOptions,
    generator,
    hosted,
    placement,
    upstream,
)


def _hump(hours: float) -> Array:
    """A smoothing kernel of unit energy: white noise goes in, smooth noise of unit variance comes out."""
    kernel = hann(int(hours * 3600 / KNOT) + 1)
    return kernel / np.linalg.norm(kernel)


#: What shocks of load and the slower drift of memory look like.
SHOCK = _hump(3)
_DRIFT = _hump(12)
#: So many knots have a burst, of this mean height [standard deviations of the shock].
_BURST_SHARE = 0.02
_BURST_HEIGHT = 2.0
#: Share r of a service's shock that comes from upstream.
_TRAVELS = 0.9


@dataclass(frozen=True)
class Kind:
    """How much load machines or containers have [percent]; each draws its own level, … within the ranges."""

    stream: Stream
    services: Callable[[SynthesizeOptions, int], Shares]
    """Of an entity: the services whose shocks reach it."""
    level: tuple[float, float]
    swing: tuple[float, float]
    shock: float
    """Standard deviation of the shock."""
    memory: tuple[float, float]


def _served(options: SynthesizeOptions, container: int) -> Shares:
    return ((placement(options, container)[1], 1.0),)


MACHINE = Kind(Stream.MACHINE, hosted, level=(34, 50), swing=(6, 11), shock=5.2, memory=(76, 92))
CONTAINER = Kind(Stream.CONTAINER, _served, level=(14, 34), swing=(4, 7), shock=3.3, memory=(40, 85))


@dataclass(frozen=True)
class _Profile:
    """One entity's regular behaviour."""

    level: float
    """Mean cpu [percent]."""
    swing: float
    """Half of the way between the day's lowest and highest load [percent of cpu]."""
    peak: float
    """Time of day of the highest load [s]."""
    weekend: float
    """How much lower the load is in the middle of the weekend [percent of cpu]."""
    memory: float
    """Mean memory [percent]."""
    network: float
    """Percent of network per percent of cpu."""


@lru_cache(maxsize=1 << 16)
def _profile(options: SynthesizeOptions, kind: Kind, entity: int) -> _Profile:
    random = generator(options, kind.stream, entity)
    swing = random.uniform(*kind.swing)
    return _Profile(
        level=random.uniform(*kind.level),
        swing=swing,
        peak=random.normal(15, 2.5) * 3600,
        weekend=swing * random.uniform(0.7, 1.3),
        memory=random.uniform(*kind.memory),
        network=random.uniform(0.75, 1.3),
    )


def span(series: Callable[[int], Array], first: int, stop: int) -> Array:
    """Knots `first` … `stop` − 1, counted from the trace's start, of a series that is made day by day."""
    days = range(first // KNOTS, (stop - 1) // KNOTS + 1)
    skipped = first - days[0] * KNOTS
    return np.concatenate([series(day) for day in days])[skipped : skipped + stop - first]


@lru_cache(maxsize=1 << 14)
def innovations(options: SynthesizeOptions, stream: Stream, entity: int, day: int) -> Array:
    """White noise of one day; the day before the trace, which is −1, counts too."""
    return generator(options, stream, entity, 1 + day).standard_normal(KNOTS)


#: Services, and the kernel [_REACH] through which the white noise of each makes a shock.
_Kernels = dict[int, Array]
#: What made a shock lies at most so many knots back: one kernel and a delay from each layer to the next.
_REACH = len(SHOCK) + (LAYERS - 1) * DELAYS[1] // KNOT


def _sum(terms: Iterable[tuple[float, int, _Kernels]]) -> _Kernels:
    """The kernels of a sum of shocks, each with its weight and delay."""
    total: _Kernels = {}
    for weight, delay, kernels in terms:
        for origin, kernel in kernels.items():
            total.setdefault(origin, np.zeros(_REACH))[delay:] += weight * kernel[: _REACH - delay]
    return total


def _deviation(kernels: _Kernels) -> float:
    """Standard deviation of the shock that they make, which no square root of shares tells: origins recur."""
    return math.sqrt(sum(kernel @ kernel for kernel in kernels.values()))


@lru_cache(maxsize=1 << 16)
def _kernels(options: SynthesizeOptions, service: int) -> _Kernels:
    """Of a service's shock: its own white noise and that of all services upstream."""
    own = {service: np.pad(SHOCK, (0, _REACH - len(SHOCK)))}
    parents = upstream(options, service)
    if not parents:
        return own
    weight = math.sqrt(_TRAVELS / len(parents))
    arriving = [(weight, delay, _kernels(options, parent)) for parent, delay in parents]
    kernels = _sum([(math.sqrt(1 - _TRAVELS), 0, own), *arriving])
    deviation = _deviation(kernels)
    return {origin: kernel / deviation for origin, kernel in kernels.items()}


@lru_cache(maxsize=1 << 14)
def service_shock(options: SynthesizeOptions, service: int, day: int) -> Array:
    """[KNOTS] shock of a service on a day, of unit variance."""
    first, stop = day * KNOTS, (day + 1) * KNOTS
    shock = np.zeros(KNOTS)
    for origin, kernel in _kernels(options, service).items():
        noise = span(partial(innovations, options, Stream.SERVICE, origin), first - _REACH + 1, stop)
        shock += np.convolve(noise, kernel, mode="valid")
    return shock


@lru_cache(maxsize=1 << 16)
def _weights(options: SynthesizeOptions, services: Shares) -> tuple[float, ...]:
    """Of the shocks of these services in a shared shock of unit variance."""
    weights = [math.sqrt(share) for _, share in services]
    kernels = [_kernels(options, service) for service, _ in services]
    deviation = _deviation(_sum((weight, 0, some) for weight, some in zip(weights, kernels, strict=True)))
    return tuple(weight / deviation for weight in weights)


@dataclass(frozen=True)
class Load:
    """Load of S shards at their K knots, [S, K] each, in percent."""

    cpu: Array
    memory: Array
    network: Array


def load(
    options: SynthesizeOptions, kind: Kind, entities: Array, starts: Array, random: np.random.Generator
) -> Load:
    """Load of shards with an entity and a start [s] each; `random` draws only what nobody could foresee."""
    knots = SHARD // KNOT + 1
    private, drift = _private_shock_and_drift(options, kind, entities, starts, knots)
    shock = math.sqrt(1 - options.coupling) * private
    if options.coupling > 0:
        shock += math.sqrt(options.coupling) * _shared_shock(options, kind, entities, starts, knots)
    bursts = np.where(
        random.random(shock.shape) < _BURST_SHARE, random.exponential(_BURST_HEIGHT, shock.shape), 0.0
    )

    profiles = [_profile(options, kind, entity) for entity in entities.tolist()]
    level, swing, peak, weekend, memory, network = np.array([astuple(p) for p in profiles]).T[:, :, None]
    time = starts[:, None] + KNOT * np.arange(knots)
    # The trace starts on a Monday; Saturday and Sunday are one smooth dip.
    into_weekend = np.clip(time / DAY % 7 - 5, 0, 2) / 2
    cycle = swing * np.cos(2 * np.pi * (time - peak) / DAY) - weekend * np.sin(np.pi * into_weekend) ** 2
    cpu = np.maximum(level + cycle + kind.shock * (shock + bursts), 0)
    return Load(cpu=cpu, memory=memory + 3 * drift + 0.1 * cycle, network=network * cpu)


def _private_shock_and_drift(
    options: SynthesizeOptions, kind: Kind, entities: Array, starts: Array, knots: int
) -> tuple[Array, Array]:
    """[S, K] each: the entity's own shock, and the same noise seen through a wider kernel."""
    history = len(_DRIFT) - 1
    noise = np.stack(
        [
            span(partial(innovations, options, kind.stream, entity), first - history, first + knots)
            for entity, first in zip(entities.tolist(), (starts // KNOT).tolist(), strict=True)
        ]
    )
    shock = fftconvolve(noise[:, history - len(SHOCK) + 1 :], SHOCK[None], mode="valid", axes=1)
    return shock, fftconvolve(noise, _DRIFT[None], mode="valid", axes=1)


def _shared_shock(
    options: SynthesizeOptions, kind: Kind, entities: Array, starts: Array, knots: int
) -> Array:
    """[S, K]: the blend of the shocks of a machine's services, or the shock of a container's service."""
    shared = np.zeros((len(entities), knots))
    for row, entity, first in zip(shared, entities.tolist(), (starts // KNOT).tolist(), strict=True):
        services = kind.services(options, entity)
        for (service, _), weight in zip(services, _weights(options, services), strict=True):
            row += weight * span(partial(service_shock, options, service), first, first + knots)
    return shared
