"""What an autoscaler sees of a cluster: late, noisy and with gaps. The same for both engines."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Observation, Truth
from fleetcast.control.pods import PENDING, STARTING, Pods


@dataclass(frozen=True)
class Measurement:
    """What was so during one interval, on average; NaN where there was nothing to measure.

    [E, S] unless said otherwise; the names are those of `Observation`.
    """

    rate: Tensor
    latency_p50: Tensor
    latency_p95: Tensor
    queue: Tensor
    errors: Tensor
    cores: Tensor
    """[E, S, R]. Cores in use in each replica."""
    own: Tensor
    """[E, S, R]. Calls in each replica, in work or waiting."""
    served: Tensor
    """[E, S, R]. Calls that each replica served [1/s]."""
    offered: Tensor
    request_p95: Tensor
    missed: Tensor
    """[E, K]."""


class Measuring:
    """Takes down measurements and hands them out after their lag."""

    def __init__(self, cluster: Cluster, pods: Pods, generator: torch.Generator) -> None:
        self._options, self._pods, self._generator = cluster.measure, pods, generator
        self._device = pods.timer.device
        self._classes, self._zones = len(cluster.entry), len(cluster.node_classes)
        self._cores = torch.as_tensor(cluster.cores, dtype=torch.float32, device=self._device).unsqueeze(1)
        self._samples: deque[dict[str, Tensor]] = deque(
            maxlen=1 + round(cluster.measure.lag / cluster.measure.interval)
        )

    def record(self, exact: Measurement) -> None:
        """The measurement of the interval that ends now. A service's may be lost as a whole."""
        pods = self._pods
        measured = pods.ready & (pods.timer >= self._options.interval)
        cpu = exact.cores / self._cores * measured
        sample = {
            "rate": self._noisy(exact.rate),
            "latency_p50": self._noisy(exact.latency_p50),
            "latency_p95": self._noisy(exact.latency_p95),
            "queue": self._noisy(exact.queue),
            "errors": self._noisy(exact.errors),
            "cpu": self._noisy(cpu.sum(2) / measured.sum(2)).clamp(max=1),
            "memory": torch.where(pods.ready, pods.memory, 0).amax(2),
            "cpu_by_class": self._noisy(self.by_class(cpu) / self.by_class(measured.float())).clamp(max=1),
            "latency_by_class": self._noisy(self.by_class(exact.own) / self.by_class(exact.served)),
            "measured": measured.sum(2).float(),
        }
        lost = torch.rand(exact.rate.shape, generator=self._generator, device=self._device)
        for name, value in sample.items():
            value[lost < self._options.missing] = 0 if name == "measured" else math.nan
        sample["offered"] = self._noisy(exact.offered)
        sample["request_p95"] = self._noisy(exact.request_p95)
        sample["missed"] = exact.missed
        self._samples.append(sample)

    def observe(self, time: float, truth: Truth | None) -> Observation:
        """All that can be seen now. Before the first measurement is old enough, none is there."""
        pods = self._pods
        late = len(self._samples) == self._samples.maxlen
        return Observation(
            time=time,
            interval=self._options.interval,
            lag=self._options.lag,
            wanted=pods.wanted.clone(),
            ready=pods.ready.sum(2).float(),
            starting=((pods.phase == PENDING) | (pods.phase == STARTING)).sum(2).float(),
            pending=(pods.phase == PENDING).sum(2).float(),
            ready_by_class=self.by_class(pods.ready.float()),
            truth=truth,
            **(self._samples[0] if late else self._nothing()),
        )

    def by_class(self, values: Tensor) -> Tensor:
        """[E, S, Z]. Sums over the replicas on nodes of each class, of [E, S, R]."""
        zones = values.new_zeros(*values.shape[:2], self._zones)
        return zones.scatter_add_(2, self._pods.node_class, values)

    def _nothing(self) -> dict[str, Tensor]:
        by_service = torch.full_like(self._pods.wanted, math.nan)
        by_zone = by_service.unsqueeze(2).repeat(1, 1, self._zones)
        by_request = by_service[:, :1].repeat(1, self._classes)
        seen = {field.name for field in fields(Measurement)} - {"cores", "own", "served"}
        of = dict.fromkeys(seen | {"cpu", "memory"}, by_service) | {"measured": torch.zeros_like(by_service)}
        return (
            of
            | dict.fromkeys(("cpu_by_class", "latency_by_class"), by_zone)
            | dict.fromkeys(("offered", "request_p95", "missed"), by_request)
        )

    def _noisy(self, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=self._generator, device=self._device)
        return value * (self._options.noise * noise).exp()
