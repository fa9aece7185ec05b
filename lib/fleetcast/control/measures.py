"""What a run is judged by: figures of sums and counts, and their intervals over seeds.

judged = Provision.zeros(environments) + provision_of(observation) …   # beside the engine's Outcome
figures(outcome, provision)                                            # name → [E]
over_seeds(values)                                                     # mean and interval
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Engine, Observation, Outcome, Policy
from fleetcast.control.policies.capacity import CapacityCurve
from fleetcast.errors import InputError

#: Of the intervals over seeds.
CONFIDENCE = 0.95
#: An interval in which more of the requests come too late or never counts as disturbed.
DISTURBED = 0.05


@dataclass(frozen=True)
class Provision:
    """Supply against demand, as sums over time and services: those of longer times are sums of these.

    Demand is what the capacity curve asks for at the true load; supply are the ready replicas. These are the
    elasticity measures of SPEC (Herbst et al. 2016), over all services.
    """

    demand: Tensor
    """[E]. Replicas needed, times intervals."""
    under: Tensor
    """[E]. Replicas that were missing, times intervals."""
    over: Tensor
    """[E]. Replicas that were too many, times intervals."""
    time: Tensor
    """[E]. Intervals, times services."""
    under_time: Tensor
    """[E]. Of these, those with too few replicas."""
    over_time: Tensor
    """[E]. Of these, those with too many."""
    disturbed: Tensor
    """[E]. Intervals in which too many requests failed."""
    disturbances: Tensor
    """[E]. Unbroken spells of such intervals that began."""

    @classmethod
    def zeros(cls, environments: int) -> Provision:
        """Nothing counted yet."""
        return cls(*(torch.zeros(environments) for _ in fields(cls)))

    @classmethod
    def of(cls, observation: Observation, curve: CapacityCurve, cluster: Cluster) -> Provision:
        """One moment; needs the observation's truth. Disturbances are counted by `judge`."""
        if observation.truth is None:
            raise InputError("provision: expected an observation with the truth")
        needed = curve.replicas(observation.truth.ahead[:, 0])
        needed = needed.clamp(min=torch.as_tensor(cluster.min_replicas).double())
        missing = needed - observation.ready.double()
        zero = torch.zeros(len(missing))
        return cls(
            demand=needed.sum(1),
            under=missing.clamp(min=0).sum(1),
            over=(-missing).clamp(min=0).sum(1),
            time=torch.full((len(missing),), float(missing.shape[1])),
            under_time=(missing > 0).sum(1).double(),
            over_time=(missing < 0).sum(1).double(),
            disturbed=zero,
            disturbances=zero,
        )

    def __add__(self, other: Provision) -> Provision:
        return Provision(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def judge(
    engine: Engine,
    policy: Policy,
    intervals: int,
    *,
    truth: bool = False,
    stretch: float = 1.5,
    on_interval: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, Provision]:
    """Lets a policy decide for some intervals; all that came of it. The policy sees the truth only if asked;
    `stretch` is the objective by which demand is told (see `capacity`); `on_interval` is told of each."""
    policy.reset(engine.cluster, engine.environments)
    curve = CapacityCurve.of(engine.cluster, stretch)
    provision = Provision.zeros(engine.environments)
    before = torch.zeros(engine.environments, dtype=torch.bool)
    outcome: Outcome | None = None
    for _ in range(intervals):
        seen = engine.observe(truth=True)
        provision += Provision.of(seen, curve, engine.cluster)
        if not truth:
            seen = Observation(**(vars(seen) | {"truth": None}))
        step = engine.step(policy.act(seen))
        now = step.good < (1 - DISTURBED) * step.offered
        nothing = Provision.zeros(engine.environments)
        provision += Provision(
            **(vars(nothing) | {"disturbed": now.double(), "disturbances": (now & ~before).double()})
        )
        before = now
        on_interval(step)
        outcome = step if outcome is None else outcome + step
    if outcome is None:
        raise InputError(f"{intervals} intervals, expected at least 1")
    return outcome, provision


#: Name → unit, in the order of tables.
UNITS = {
    "reward": "1",
    "latency_mean": "ms", "latency_p50": "ms", "latency_p95": "ms", "latency_p99": "ms", "missed": "%",
    "throughput": "1/s", "goodput": "1/s", "efficiency": "%", "replica_hours": "h", "core_hours": "h",
    "churn": "1/h", "under": "%", "under_time": "%", "over": "%", "over_time": "%", "recovery": "s",
}  # fmt: skip


def figures(outcome: Outcome, provision: Provision, interval: float) -> dict[str, Tensor]:
    """Name → [E], in UNITS; `interval` is the time between two decisions [s]. NaN where nothing was counted.

    Efficiency is useful CPU ÷ allocated CPU: CPU spent, times the share of attempts that were in time.
    Hours are those of the run; churn is replicas changed per hour; `under` and `over` are shares of demand,
    the `_time` ones of time; recovery is the mean length of a spell in which more than 5 % failed.
    """
    done = outcome.good + outcome.failed
    return {
        "latency_mean": 1000 * outcome.latency / outcome.answered,
        "latency_p50": 1000 * outcome.quantile(0.5),
        "latency_p95": 1000 * outcome.quantile(0.95),
        "latency_p99": 1000 * outcome.quantile(0.99),
        "missed": 100 * (1 - outcome.good / outcome.offered),
        "throughput": outcome.answered / outcome.seconds,
        "goodput": outcome.good / outcome.seconds,
        "efficiency": 100 * outcome.cpu_used * (outcome.good / done) / outcome.cpu_allocated,
        "replica_hours": outcome.replica_seconds / 3600,
        "core_hours": outcome.cpu_allocated / 3600,
        "churn": outcome.changes / outcome.seconds * 3600,
        "under": 100 * provision.under / provision.demand,
        "under_time": 100 * provision.under_time / provision.time,
        "over": 100 * provision.over / provision.demand,
        "over_time": 100 * provision.over_time / provision.time,
        "recovery": interval * provision.disturbed / provision.disturbances,
    }


@dataclass(frozen=True)
class Interval:
    """A mean, and how far the true mean may be from it."""

    mean: float
    width: float
    """Half of the interval; ∞ where one value says nothing of chance."""

    def __str__(self) -> str:
        # Two digits of the width, but never as a power of ten.
        return f"{self.mean:.4g} ± {float(f'{self.width:.2g}'):g}"


def over_seeds(values: ArrayLike) -> Interval:
    """Mean and Student's interval over seeds; values that are NaN (nothing was counted) are left out."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return Interval(np.nan, np.nan)
    if len(known) == 1:
        return Interval(float(known[0]), np.inf)
    scale = stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)
    return Interval(float(known.mean()), float(scale * known.std(ddof=1) / len(known) ** 0.5))
