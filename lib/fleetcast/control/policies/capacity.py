"""Capacity curves: how many replicas a service needs for a load, by an objective for its latency.

The objective is a stretch: a call's mean time in the service, in times without waiting. Means add up along a
path, so a stretch that all services keep is one that requests keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster
from fleetcast.control.stations import shape
from fleetcast.errors import InputError

#: Halvings of the utilisation.
_ROUNDS = 40


class CapacityCurve:
    """Loads that 1 … R replicas of each service carry within the objective."""

    def __init__(self, rates: Tensor) -> None:
        """`rates` [S, R], calls per second, rising along R."""
        if not bool((rates.diff(dim=1) > 0).all()):
            raise InputError("capacity curve: expected more load for more replicas")
        self.rates = rates.double()

    @classmethod
    def of(cls, cluster: Cluster, stretch: float) -> CapacityCurve:
        """By the closed form of a replica, n(ρ) calls in it at utilisation ρ: n(ρ) ÷ kρ is the stretch.

        Nodes count with the mean speed of their cores. Raises InputError unless `stretch` is above 1.
        """
        if stretch <= 1:
            raise InputError(f"stretch {stretch}, expected more than 1")
        cores, demand, slots, scv = (
            torch.as_tensor(one, dtype=torch.float64).unsqueeze(1)
            for one in (cluster.cores, cluster.demand, cluster.slots, cluster.demand_cv**2)
        )
        speed = float((cluster.node_cores * cluster.node_speed).sum() / cluster.node_cores.sum())
        replicas = torch.arange(1, int(cluster.max_replicas.max()) + 1, dtype=torch.float64)
        low = torch.zeros(len(cores), len(replicas), dtype=torch.float64)
        high = torch.ones_like(low)
        at_once = cores.clamp(min=1)
        for _ in range(_ROUNDS):
            busy = (low + high) / 2
            factor, exponent = shape(cluster.balancer, at_once, replicas.expand_as(busy), slots, scv, busy)
            waits = factor * busy**exponent / (1 - busy)
            fits = waits <= (stretch - 1) * at_once * busy
            low, high = torch.where(fits, busy, low), torch.where(fits, high, busy)
        return cls(low * replicas * cores * speed / demand)

    def replicas(self, rate: Tensor) -> Tensor:
        """[…, S] calls per second → least replicas that carry them, as many as the curve has at most; NaN
        stays NaN."""
        flat = rate.double().reshape(-1, len(self.rates)).T.contiguous()
        count = 1 + torch.searchsorted(self.rates, flat.nan_to_num(0)).clamp(max=self.rates.shape[1] - 1)
        return torch.where(flat.isnan(), torch.nan, count.double()).T.reshape(rate.shape)
