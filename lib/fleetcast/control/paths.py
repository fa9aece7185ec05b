"""Passes along the call graph for many environments: calls go down, times and failures come back up.

A pass goes level by level, so its cost grows with the edges. Tensors are [S, E, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster


@dataclass(frozen=True)
class _Level:
    """The edges to services of one depth: all edges to these."""

    caller: Tensor
    callee: Tensor
    calls: Tensor
    """[l, 1, K]."""
    chance: Tensor
    """[l, 1, K]. Variance of the number of calls: a call that is made or not."""


@dataclass(frozen=True)
class Spans:
    """Of a call of each class at each service, with all that it calls in turn: [S, E, K]."""

    mean: Tensor
    """[s]."""
    variance: Tensor
    hazard: Tensor
    """It fails with a probability of 1 − exp(−hazard)."""


class Paths:
    def __init__(self, cluster: Cluster, device: torch.device) -> None:
        depth = cluster.depth[cluster.callee]
        self.entry = torch.from_numpy(cluster.entry).to(device)
        self._classes = torch.arange(len(cluster.entry), device=device)
        self._services = len(cluster.names)
        self._levels = []
        for level in range(1, int(depth.max(initial=0)) + 1):
            edges = np.flatnonzero(depth == level)
            calls = torch.from_numpy(cluster.calls[:, edges].T[:, None].astype(np.float32)).to(device)
            self._levels.append(
                _Level(
                    torch.from_numpy(cluster.caller[edges]).to(device),
                    torch.from_numpy(cluster.callee[edges]).to(device),
                    calls,
                    (calls % 1) * (1 - calls % 1),
                )
            )

    def flows(self, requests: Tensor, passed: Tensor) -> Tensor:
        """[S, E, K]. Calls per second of each class, of the requests [E, K] and the share of calls that each
        service works on and so passes on [S, E]."""
        flows = requests.new_zeros(self._services, *requests.shape)
        flows[self.entry, :, self._classes] = requests.T
        for level in self._levels:
            made = flows[level.caller] * passed[level.caller].unsqueeze(2) * level.calls
            flows.index_add_(0, level.callee, made)
        return flows

    def spans(self, mean: Tensor, variance: Tensor, hazard: Tensor) -> Spans:
        """Of the time in each service alone, its variance, and the hazard of a failure there, all [S, E].

        A call makes its calls one after the other, and their times are taken as independent.
        """
        of_all = torch.stack((mean, variance, hazard)).unsqueeze(3).repeat(1, 1, 1, len(self._classes))
        for level in reversed(self._levels):
            below = of_all[:, level.callee]
            made = below * level.calls
            made[1] += level.chance * below[0] ** 2
            of_all.index_add_(1, level.caller, made)
        return Spans(*of_all)

    def hold_back(self, flows: Tensor, number: Tensor, limit: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """[S, E] each. How many calls leave a service again because its callers have no slots left to wait
        in, and how many calls come back to a service because it had no slot for them to wait in.

        `number` are the calls at each service and below it, `limit` the slots of its replicas, [S, E];
        `flows` [S, E, K] is what each caller passes on per second of this step [s]. Calls that come back have
        not been worked on yet, and are as many as would have made those that leave.
        """
        leave, back = torch.zeros_like(number), torch.zeros_like(number)
        for level in reversed(self._levels):
            passed = flows[level.caller]
            made = (passed * level.calls).sum(2)
            room, whole = torch.zeros_like(number), torch.zeros_like(number)
            room.index_add_(0, level.callee, limit[level.caller])
            whole.index_add_(0, level.callee, made)
            excess = torch.minimum((number + back - room).clamp(min=0), step * whole)[level.callee]
            leave[level.callee] = excess
            back.index_add_(0, level.caller, excess / whole.clamp(min=1e-9)[level.callee] * passed.sum(2))
        return leave, back

    def of_requests(self, spans: Tensor) -> Tensor:
        """[E, K]. Of each class where its requests come in, of [S, E, K]."""
        return spans[self.entry, :, self._classes].T
