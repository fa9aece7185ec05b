"""What an agent sees: an observation as tensors of numbers mostly from 0 to 1, and the last few of them.

    window = Window(Scales.of(cluster), length=16, changes=(-0.2, 0, 0.2))
    window.reset(environments)
    window.push(observation)    # telemetry [E, T, S, F], requests [E, T, K, 3], mask [E, S, C]

The same in training, in experiments and live. A model is kept with the scales of its cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Observation
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy

#: Of a service in `telemetry`, before the three of each class of nodes (ready, cpu, latency).
FEATURES = (
    "known", "rate", "latency_p50", "latency_p95", "cpu", "memory", "queue", "errors", "wanted", "ready",
    "starting", "pending", "load", "needed", "replicas", "asked", "gap", "weight", "cost",
)  # fmt: skip
#: Of a class of requests in `requests`.
REQUEST_FEATURES = ("offered", "request_p95", "missed")
#: No feature is larger.
LARGEST = 10.0
#: So that 10 · 1.1 is 11.
_ROUNDING = 1e-4


def _shares(changes: tuple[float, ...]) -> tuple[float, ...]:
    rising = all(one < other for one, other in pairwise(changes))
    if 0 not in changes or not rising or changes[0] <= -1:
        raise ValueError(f"changes {changes}, expected rising shares above -1 with 0 among them")
    return changes


Changes = Annotated[tuple[float, ...], AfterValidator(_shares)]
"""Changes of a service's replicas to choose from, as shares of them: 0.15 is 15 % more."""
#: Those of agents, if no others are given.
CHANGES: Changes = (-0.4, -0.3, -0.2, -0.1, 0.0, 0.15, 0.3, 0.6)


def features(zones: int) -> int:
    """F, of so many classes of nodes."""
    return len(FEATURES) + 3 * zones


class Scales(Options):
    """What the features of a cluster are told by; S services, K classes of requests, Z classes of nodes."""

    rate: tuple[float, ...]
    """[S]. Calls that a service gets on average [1/s]."""
    capacity: tuple[float, ...]
    """[S]. Calls that a replica can work off on a node of speed 1 [1/s]."""
    cores: tuple[float, ...]
    """[S]. CPU that a replica requests."""
    weight: tuple[float, ...]
    """[S]. CPU time that a request spends in the service, on average [core-s]."""
    least: tuple[int, ...]
    most: tuple[int, ...]
    """[S]. Bounds of the replicas."""
    class_rate: tuple[float, ...]
    """[K]. Requests that users make on average [1/s]."""
    deadline: tuple[float, ...]
    """[K]. [s]."""
    longest: float = Field(gt=0)
    """Mean deadline [s]."""
    zones: int = Field(ge=1)
    """Z."""

    @classmethod
    def of(cls, cluster: Cluster) -> Scales:
        """Those of a cluster at the rate that it is made for."""
        visits = cluster.share @ cluster.visits
        return cls(
            rate=tuple(np.maximum(cluster.rate * visits, 1e-6).tolist()),
            capacity=tuple((cluster.cores / cluster.demand).tolist()),
            cores=tuple(cluster.cores.tolist()),
            weight=tuple((visits * cluster.demand).tolist()),
            least=tuple(cluster.min_replicas.tolist()),
            most=tuple(cluster.max_replicas.tolist()),
            class_rate=tuple((cluster.rate * cluster.share).tolist()),
            deadline=tuple(cluster.deadline.tolist()),
            longest=float(cluster.share @ cluster.deadline),
            zones=len(cluster.node_classes),
        )


class Window:
    """The last observations of environments side by side, as an agent sees them; 0 before the first."""

    def __init__(
        self,
        scales: Scales,
        length: int,
        changes: Sequence[float],
        rule: KubernetesOptions | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """`length` T; `changes` [C] to choose from, as shares of the replicas that a `rule` asks for, or of
        those that are wanted now without one."""
        self._rule = None if rule is None else KubernetesPolicy(rule)
        self.scales, self.length, self._device = scales, length, torch.device(device)
        self._changes = torch.tensor(changes, dtype=torch.float32, device=self._device)

        def along(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device)

        self._rate, self._capacity = along(scales.rate), along(scales.capacity)
        self._least, self._most = along(scales.least), along(scales.most)
        self._class_rate, self._deadline = along(scales.class_rate), along(scales.deadline)
        weight, cores = along(scales.weight), along(scales.cores)
        self._weight = torch.log1p(weight / weight.mean().clamp(min=1e-12))
        self._cost = torch.log1p(cores / cores.mean())

    def reset(self, environments: int) -> None:
        """A new episode begins."""
        shape = (environments, self.length)
        services, classes = len(self.scales.rate), len(self.scales.class_rate)
        self._telemetry = torch.zeros(*shape, services, features(self.scales.zones), device=self._device)
        self._requests = torch.zeros(*shape, classes, len(REQUEST_FEATURES), device=self._device)
        if self._rule is not None:
            self._rule.begin(self._least, self._most, self._capacity.double())

    def push(self, seen: Observation) -> dict[str, Tensor]:
        """`telemetry` [E, T, S, F], `requests` [E, T, K, 3] and `mask` [E, S, C], with what is seen now as
        the last of the T."""
        self.base = seen.wanted if self._rule is None else self._rule.act(seen).replicas
        """[E, S]. Replicas that changes are counted from."""
        services, requests = self.services(seen), self.requests(seen)
        self._telemetry = torch.cat((self._telemetry[:, 1:], services.unsqueeze(1)), 1)
        self._requests = torch.cat((self._requests[:, 1:], requests.unsqueeze(1)), 1)
        return {
            "telemetry": self._telemetry,
            "requests": self._requests,
            "mask": self.mask(),
        }

    def services(self, seen: Observation) -> Tensor:
        """[E, S, F]. Mostly from 0 to 1; 0 where nothing is known, and `known` says so."""
        longest = self.scales.longest
        by_service = torch.stack(
            (
                (~seen.rate.isnan()).float(),
                seen.rate / self._rate,
                torch.log1p(10 * seen.latency_p50 / longest),
                torch.log1p(10 * seen.latency_p95 / longest),
                seen.cpu,
                seen.memory,
                torch.log1p(seen.queue) / 5,
                torch.log1p(seen.errors) / 5,
                seen.wanted / self._most,
                seen.ready / self._most,
                seen.starting / self._most,
                seen.pending / self._most,
                seen.rate / (self._capacity * seen.wanted.clamp(min=1)),
                torch.log1p(seen.rate / self._capacity) / 2,
                torch.log1p(seen.wanted) / 2,
                torch.log1p(self.base) / 2,
                (self.base - seen.wanted) / 4,
                self._weight.expand_as(seen.wanted),
                self._cost.expand_as(seen.wanted),
            ),
            2,
        )
        by_zone = torch.cat(
            (
                seen.ready_by_class / self._most.unsqueeze(1),
                seen.cpu_by_class,
                torch.log1p(10 * seen.latency_by_class / longest),
            ),
            2,
        )
        return torch.cat((by_service, by_zone), 2).nan_to_num(0).clamp(-LARGEST, LARGEST)

    def requests(self, seen: Observation) -> Tensor:
        """[E, K, 3]. As `services`."""
        requests = torch.stack(
            (
                seen.offered / self._class_rate,
                torch.log1p(seen.request_p95 / self._deadline),
                seen.missed,
            ),
            2,
        )
        return requests.nan_to_num(0).clamp(max=LARGEST)

    def mask(self) -> Tensor:
        """[E, S, C]. Which changes keep within the least and the most replicas, from those of `base`."""
        after = self._after(self.base.unsqueeze(2), self._changes)
        return (after >= self._least.unsqueeze(1)) & (after <= self._most.unsqueeze(1))

    def changed(self, change: Tensor) -> Tensor:
        """[E, S]. Replicas after the changes at these places.

        Of a rule's replicas they are rounded up, so that noise in the choice leaves small services alone; of
        those that are wanted now, each change is one replica at least, or none would ever go.
        """
        return self._after(self.base, self._changes[change])

    def _after(self, base: Tensor, share: Tensor) -> Tensor:
        if self._rule is not None:
            return (base * (1 + share) - _ROUNDING).ceil()
        return base + share.sign() * (base * share.abs() - _ROUNDING).ceil()
