"""Tuning of rules on training traffic, by the objective and the budget that a learned policy gets.

Random search over the options of a policy: its first candidate are the defaults, so it is never worse than
they are on what it is tuned on. The budget is counted in decisions of one environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from pydantic import Field

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.engine import FluidEngine
from fleetcast.control.environment import EnvironmentOptions, Environments
from fleetcast.control.interface import Policy, run
from fleetcast.control.policies.forecast_driven import ForecastOptions
from fleetcast.control.policies.kubernetes import KubernetesOptions
from fleetcast.control.policies.limits import Behaviour, ScalingPolicy, ScalingRules
from fleetcast.control.policies.staffing import StaffingOptions
from fleetcast.control.policies.translb import TranslbOptions
from fleetcast.control.traffic import Traffic
from fleetcast.errors import InputError

Candidate = TypeVar("Candidate")


class CalibrateOptions(Options):
    """How rules are tuned."""

    decisions: int = Field(100_000, ge=1)
    """Budget: decisions of one environment, all candidates together."""
    objective: EnvironmentOptions = EnvironmentOptions()
    """Weights of the reward, and the step of the simulator."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Calibrated(Generic[Candidate]):
    """The best candidate, and all that were tried."""

    best: Candidate
    tried: list[tuple[Candidate, float]]
    """With their mean rewards, in order."""
    decisions: int
    """Spent."""


def calibrate(
    build: Callable[[Candidate], Policy],
    draw: Callable[[np.random.Generator], Candidate],
    default: Candidate,
    cluster: Cluster,
    training: Traffic,
    options: CalibrateOptions,
    *,
    truth: bool = False,
) -> Calibrated[Candidate]:
    """Searches on all of the training traffic. Raises InputError where the budget is not enough for one."""
    intervals = int(training.rates.shape[1] * training.step / cluster.measure.interval)
    each = intervals * len(training.rates)
    if options.decisions < each:
        raise InputError(f"a budget of {options.decisions} decisions, expected at least {each} for one run")
    whole = options.objective.model_copy(update={"episode": intervals})
    reward = Environments(cluster, training, whole, len(training.rates)).reward
    random = np.random.default_rng(options.seed)
    candidates = [default, *(draw(random) for _ in range(options.decisions // each - 1))]
    tried = []
    for candidate in candidates:
        engine = FluidEngine(cluster, training, step=options.objective.step, seed=options.seed)
        outcomes = run(engine, build(candidate), intervals, truth=truth)
        tried.append((candidate, float(np.mean([float(reward(one).mean()) for one in outcomes]))))
    return Calibrated(max(tried, key=lambda one: one[1])[0], tried, each * len(tried))


def draw_kubernetes(random: np.random.Generator) -> KubernetesOptions:
    """Target 40 … 80 %, tolerance, windows, scaling policies, and the metric."""
    return KubernetesOptions(
        metric=str(random.choice(["cpu", "rate", "both"])),
        target=float(random.uniform(40, 80)),
        tolerance=float(random.uniform(0, 0.2)),
        behaviour=_behaviour(random),
    )


def draw_staffing(random: np.random.Generator) -> StaffingOptions:
    """β from 0.5 to 2.5, and the same windows and scaling policies."""
    return StaffingOptions(room=float(random.uniform(0.5, 2.5)), behaviour=_behaviour(random))


def draw_translb(random: np.random.Generator, options: TranslbOptions) -> TranslbOptions:
    """How far its weights are followed."""
    return options.model_copy(update={"exponent": float(random.uniform(0, 1))})


def draw_forecast(random: np.random.Generator) -> ForecastOptions:
    """Objective of the capacity curve, lead time, and the same windows and scaling policies."""
    return ForecastOptions(
        stretch=float(1 + 10 ** random.uniform(-1.5, 0.3)),
        lead=int(random.integers(1, 9)),
        behaviour=_behaviour(random),
    )


def _behaviour(random: np.random.Generator) -> Behaviour:
    down = ScalingPolicy(kind="percent", value=float(random.choice([10, 25, 50, 100])), period=60)
    return Behaviour(
        up=Behaviour().up.model_copy(update={"window": float(random.choice([0, 0, 15, 30]))}),
        down=ScalingRules(window=float(random.choice([0, 60, 120, 300, 600])), policies=(down,)),
    )
