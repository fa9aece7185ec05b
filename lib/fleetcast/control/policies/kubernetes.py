"""H-Auto: the rule of Kubernetes' HorizontalPodAutoscaler, as its controller computes it.

For every metric a number of replicas, the largest of them, then the limits of `limits`. Functions take and
give float64 tensors of any one shape, so they serve all services of all environments at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Action, Observation
from fleetcast.control.policies.limits import ROUNDING, Behaviour, Limits


class KubernetesOptions(Options):
    """A HorizontalPodAutoscaler of every service. The defaults are Kubernetes', with a target of 70 %."""

    metric: Literal["cpu", "rate", "both"] = "cpu"
    """CPU utilisation (Resource), calls per second and replica (External, AverageValue), or the larger of
    what both ask for."""
    target: float = Field(70, gt=0, le=100)
    """Percent: of a replica's CPU request, or of the calls per second that it can work off."""
    tolerance: float = Field(0.1, ge=0, lt=1)
    """No change while usage ÷ target is so close to 1."""
    behaviour: Behaviour = Behaviour()


class KubernetesPolicy:
    """The rule, at each decision of all environments."""

    def __init__(self, options: KubernetesOptions | None = None) -> None:
        self.options = options or KubernetesOptions()

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self.begin(
            torch.as_tensor(cluster.min_replicas),
            torch.as_tensor(cluster.max_replicas),
            torch.as_tensor(cluster.cores / cluster.demand),
        )

    def begin(self, least: Tensor, most: Tensor, capacity: Tensor) -> None:
        """A new episode begins, of services with so many replicas [S], each of which can work off `capacity`
        calls per second [S]."""
        self._limits = Limits(self.options.behaviour, least, most)
        self._target = self.options.target / 100 * capacity

    def act(self, observation: Observation) -> Action:
        """Replicas alone: the rule knows neither routing nor restarts."""
        current = observation.wanted.double()
        answers = []
        if self.options.metric in ("cpu", "both"):
            answers.append(self._by_cpu(observation, current))
        if self.options.metric in ("rate", "both"):
            answers.append(
                average_value(
                    observation.rate.double(), self._target, current, current, self.options.tolerance
                )
            )
        stacked = torch.stack(answers)
        asked = torch.where(stacked.isnan(), -torch.inf, stacked).amax(0)
        # A metric that could not be read forbids scaling in; if none could, nothing is changed.
        keep = stacked.isnan().any(0) & (asked < current)
        recommended = torch.where(keep, current, asked)
        return Action(self._limits.apply(observation.time, current, recommended).float())

    def _by_cpu(self, seen: Observation, current: Tensor) -> Tensor:
        """Replicas by CPU; NaN where nothing was measured.

        Those that start, and those so young that no sample is theirs alone, are unready; a replica that left
        since the measurement is neither measured nor counted.
        """
        measured = seen.measured.double()
        young = (seen.ready.double() - measured).clamp(min=0) + seen.starting.double()
        replicas = utilisation(
            seen.cpu.double().nan_to_num(0) * measured,
            measured,
            current,
            self.options.target,
            unready=young,
            tolerance=self.options.tolerance,
        )
        return torch.where(measured > 0, replicas, torch.nan)


def utilisation(
    usage: Tensor,
    ready: Tensor,
    current: Tensor,
    target: float,
    *,
    unready: Tensor | float = 0.0,
    missing: Tensor | float = 0.0,
    tolerance: float = 0.1,
) -> Tensor:
    """Replicas that a Resource metric asks for.

    `usage` is what the `ready` replicas use together, in requests of one replica; `target` is in percent;
    `unready` ones have no usage that counts, `missing` ones no sample; `current` is the scale's number.
    """

    def ratio(used: Tensor, replicas: Tensor) -> Tensor:
        # The controller divides whole percents, rounded down.
        return (100 * used / replicas.clamp(min=1) + ROUNDING).floor() / target

    return _counting(ratio, usage, ready, current, max(100.0, target) / 100, unready, missing, tolerance)


def pods_metric(
    total: Tensor,
    ready: Tensor,
    current: Tensor,
    target: float,
    *,
    unready: Tensor | float = 0.0,
    missing: Tensor | float = 0.0,
    tolerance: float = 0.1,
) -> Tensor:
    """Replicas that a Pods metric asks for, of what the `ready` replicas have together.

    As `utilisation`, but without whole percents, and what is missing counts as the target when scaling in.
    """

    def ratio(used: Tensor, replicas: Tensor) -> Tensor:
        return used / (target * replicas.clamp(min=1))

    return _counting(ratio, total, ready, current, target, unready, missing, tolerance)


def _counting(
    ratio: Callable[[Tensor, Tensor], Tensor],
    used: Tensor,
    ready: Tensor,
    current: Tensor,
    assumed: float,
    unready: Tensor | float,
    missing: Tensor | float,
    tolerance: float,
) -> Tensor:
    """The rule of metrics that belong to replicas: what is not known counts against a change.

    `assumed` is what a missing replica uses when scaling in; when scaling out that is 0, as an unready one's.
    """
    used, ready = used.double(), ready.double()
    unready, missing = (torch.as_tensor(one, dtype=torch.float64) for one in (unready, missing))
    first = ratio(used, ready)
    plain = torch.where(_within(first, tolerance), current, _ceil(first * ready))

    counted = ready + torch.where(first != 1, missing, 0.0) + torch.where(first > 1, unready, 0.0)
    second = ratio(used + torch.where(first < 1, assumed * missing, 0.0), counted)
    turned = ((first < 1) & (second > 1)) | ((first > 1) & (second < 1))
    asked = _ceil(second * counted)
    against = ((second < 1) & (asked > current)) | ((second > 1) & (asked < current))
    careful = torch.where(_within(second, tolerance) | turned | against, current, asked)
    return torch.where(((unready > 0) & (first > 1)) | (missing > 0), careful, plain)


def external_value(
    total: Tensor, target: Tensor | float, ready: Tensor, current: Tensor, tolerance: float = 0.1
) -> Tensor:
    """Replicas that an External or Object metric with a `Value` asks for."""
    ratio = total / target
    scaled = torch.where(_within(ratio, tolerance), current, _ceil(ratio * ready))
    return torch.where(current == 0, _ceil(ratio), scaled)


def average_value(
    total: Tensor, target: Tensor | float, replicas: Tensor, current: Tensor, tolerance: float = 0.1
) -> Tensor:
    """Replicas that an External or Object metric with an `AverageValue` asks for; NaN where it is missing."""
    ratio = total / (target * replicas)
    return torch.where(_within(ratio, tolerance), current, _ceil(total / target))


def _within(ratio: Tensor, tolerance: float) -> Tensor:
    return (ratio >= 1 - tolerance - ROUNDING) & (ratio <= 1 + tolerance + ROUNDING)


def _ceil(value: Tensor) -> Tensor:
    return (value - ROUNDING).ceil()
