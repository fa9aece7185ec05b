"""Requests over time: the patterns of the experiments, or a series of the store, for many environments.

What is made here are rates; both engines draw arrivals from them. Environment e of seed s is environment 0 of
seed s + e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.signal import lfilter
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.errors import InputError

Floats = NDArray[np.floating[Any]]
Pattern = Literal["sine", "bursts", "peaks", "flash_crowd", "regimes"]
Arrivals = Literal["poisson", "mmpp", "negative_binomial"]

HOUR = 3600.0
#: Intervals of which `Truth.ahead` tells.
AHEAD = 40
#: How fast what classes ask for drifts: the deviation of their shares' logarithms, and its time [s].
_DRIFT, _DRIFT_TIME = 0.15, 2 * HOUR
#: Two states of arrivals: factors of the rate, and how long each lasts on average [s].
_CALM, _BUSY = (0.8, 60.0), (1.6, 20.0)


class TrafficOptions(Options):
    """Requests per second over time."""

    patterns: tuple[Pattern, ...] = Field(("sine", "bursts", "peaks"), min_length=1)
    """Environments take these in turn."""
    hours: float = Field(72, gt=0)
    """Length of an episode."""
    level: float = Field(1, gt=0)
    """Mean rate, in rates that the cluster is made for."""
    amplitude: float = Field(0.5, ge=0, lt=1)
    """Of the daily wave, in means."""
    period: float = Field(24, gt=0)
    """Of the wave [h]."""
    arrivals: Arrivals = "mmpp"
    """How arrivals vary around the rate: as Poisson alone; in calm and busy spells; or anew at each step."""
    dispersion: float = Field(0.01, gt=0)
    """Of negative_binomial: variance of the rate of a step in squared means."""
    step: float = Field(5, gt=0)
    """Time for which a rate holds [s]."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Traffic:
    """Rates of requests."""

    rates: Tensor
    """[E, T, K], float32. Requests per second of each class, each for one step."""
    step: float
    """[s]."""

    def at(self, time: float) -> Tensor:
        """[E, K]. Requests per second now; of the last step after the end."""
        return self.rates[:, min(int(time / self.step + 1e-9), self.rates.shape[1] - 1)]

    def ahead(self, time: float, interval: float, count: int) -> Tensor:
        """[E, count, K]. Mean rates of the next intervals."""
        per = max(1, round(interval / self.step))
        places = int(time / self.step + 1e-9) + torch.arange(count * per)
        rates = self.rates[:, places.clamp(max=self.rates.shape[1] - 1)]
        return rates.unflatten(1, (count, per)).mean(2)


def generate(options: TrafficOptions, cluster: Cluster, environments: int = 1) -> Traffic:
    """Rates of every environment; the same options, the same rates."""
    made = []
    for number in range(environments):
        random = np.random.default_rng([options.seed + number, 0x7A])
        pattern = options.patterns[(options.seed + number) % len(options.patterns)]
        hours = np.arange(round(options.hours * HOUR / options.step)) * options.step / HOUR
        shape = np.maximum(_PATTERNS[pattern](hours, options, random), 0.02)
        made.append(_spread(shape / shape.mean() * options.level * cluster.rate, options, cluster, random))
    return Traffic(torch.from_numpy(np.stack(made)), options.step)


def replay(series: pl.DataFrame, options: TrafficOptions, cluster: Cluster, environments: int = 1) -> Traffic:
    """Rates that rise and fall like a series of telemetry, `time` and `request_rate`, with the given mean.

    Between two bins it goes straight; missing bins too. Each environment begins at another place of it, and
    it begins anew after its end. Raises InputError if there are fewer than two bins with a value.
    """
    known = series.drop_nulls("request_rate").sort("time")
    if len(known) < 2:
        raise InputError(f"{len(known)} bins of request_rate, expected at least 2 to replay")
    seconds = known["time"].dt.epoch("s").to_numpy().astype(float)
    seconds -= seconds[0]
    length = round(options.hours * HOUR / options.step)
    made = []
    for number in range(environments):
        random = np.random.default_rng([options.seed + number, 0x7B])
        start = 0.0 if environments == 1 else random.uniform(0, seconds[-1])
        times = (start + np.arange(length) * options.step) % seconds[-1]
        shape = np.interp(times, seconds, known["request_rate"].to_numpy())
        made.append(
            _spread(shape / max(shape.mean(), 1e-9) * options.level * cluster.rate, options, cluster, random)
        )
    return Traffic(torch.from_numpy(np.stack(made)), options.step)


def constant(rate: float, *, seconds: float, step: float = 5, environments: int = 1) -> Traffic:
    """The same rate of one class all the time."""
    return Traffic(torch.full((environments, max(1, round(seconds / step)), 1), float(rate)), step)


def _spread(
    total: Floats, options: TrafficOptions, cluster: Cluster, random: np.random.Generator
) -> NDArray[np.float32]:
    """[T, K]. The rates of the classes, of the rate of all [T]."""
    total = total * _variation(len(total), options, random)
    keep = np.exp(-options.step / _DRIFT_TIME)
    noise = random.standard_normal((len(total), len(cluster.share))) * _DRIFT * np.sqrt(1 - keep**2)
    noise[0] /= np.sqrt(1 - keep**2)
    shares = cluster.share * np.exp(lfilter([1], [1, -keep], noise, axis=0))
    return (total[:, None] * shares / shares.sum(1, keepdims=True)).astype(np.float32)


def _variation(length: int, options: TrafficOptions, random: np.random.Generator) -> Floats:
    """[T]. What the rate is multiplied by, 1 on average."""
    match options.arrivals:
        case "poisson":
            return np.ones(length)
        case "negative_binomial":
            return random.gamma(1 / options.dispersion, options.dispersion, length)
        case "mmpp":
            spells = 2 + int(length * options.step / (_CALM[1] + _BUSY[1]) * 2)
            lasts = random.exponential(1, (spells, 2)) * (_CALM[1], _BUSY[1])
            ends = np.cumsum(lasts.ravel())
            at = np.searchsorted(ends, np.arange(length) * options.step, side="right")
            return np.where(at % 2, _BUSY[0], _CALM[0])


def _wave(hours: Floats, options: TrafficOptions, random: np.random.Generator, of: float = 1) -> Floats:
    phase = random.uniform(0, 1)
    return 1 + of * options.amplitude * np.sin(2 * np.pi * (hours / options.period + phase))


def _times(hours: Floats, every: float, random: np.random.Generator) -> Floats:
    """When something happens that happens every so many hours on average; once at least."""
    end = float(hours[-1])
    return np.sort(random.uniform(0, end, max(1, random.poisson(end / every))))


def _sine(hours: Floats, options: TrafficOptions, random: np.random.Generator) -> Floats:
    return _wave(hours, options, random)


def _bursts(hours: Floats, options: TrafficOptions, random: np.random.Generator) -> Floats:
    """Bumps of minutes on half a wave."""
    shape = _wave(hours, options, random, 0.5)
    for at in _times(hours, 2, random):
        height, width = random.uniform(0.5, 1.5), random.uniform(2, 10) / 60
        shape += height * np.exp(-0.5 * ((hours - at) / width) ** 2)
    return shape


def _peaks(hours: Floats, options: TrafficOptions, random: np.random.Generator) -> Floats:
    """Sudden plateaus at random times."""
    shape = _wave(hours, options, random, 0.2)
    for at in _times(hours, 1.5, random):
        shape[(hours >= at) & (hours < at + random.exponential(10) / 60)] += random.lognormal(-0.3, 0.5)
    return shape


def _flash_crowd(hours: Floats, options: TrafficOptions, random: np.random.Generator) -> Floats:
    """Once a day everybody comes within two minutes, and leaves over an hour."""
    shape = _wave(hours, options, random, 0.5)
    for at in _times(hours, 24, random):
        rise = np.clip((hours - at) * 30, 0, 1)
        fade = np.exp(-np.maximum(hours - at, 0) * 2)
        shape += random.uniform(1.5, 3) * rise * fade
    return shape


def _regimes(hours: Floats, options: TrafficOptions, random: np.random.Generator) -> Floats:
    """From time to time another level and another wave."""
    shape = _wave(hours, options, random)
    for at in _times(hours, 12, random):
        after = hours >= at
        shape[after] = random.uniform(0.5, 1.7) * _wave(hours, options, random, random.uniform(0, 1))[after]
    return shape


_PATTERNS: dict[Pattern, Callable[[Floats, TrafficOptions, np.random.Generator], Floats]] = {
    "sine": _sine,
    "bursts": _bursts,
    "peaks": _peaks,
    "flash_crowd": _flash_crowd,
    "regimes": _regimes,
}
