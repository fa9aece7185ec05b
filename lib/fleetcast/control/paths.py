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

    def throttle(
        self,
        requests: Tensor,
        flows: Tensor,
        capacity: Tensor,
        number: Tensor,
        held: Tensor,
        slots: Tensor,
        step: float,
    ) -> Tensor:
        """[S, E]. Calls per second that a service can at most finish, as what it calls takes no more from it;
        infinite where nothing stands in the way.

        A call keeps its slot while it waits for the calls that it makes. So a service takes from its callers
        what it works off (`capacity`), and in two steps only so many more as they have `slots` for, of which
        `held` are taken by calls at it and below it. Where callers could send more than that in a `step` [s],
        with the `number` that waits at them, all of them send less, in the mix of their last `flows`
        [S, E, K]. All others [S, E].
        """
        arriving, room = torch.zeros_like(number), torch.zeros_like(number)
        arriving.index_add_(0, self.entry, requests.T)
        made = []
        for level in self._levels:
            of_caller = flows[level.caller]
            made.append((of_caller * level.calls).sum(2) / of_caller.sum(2).clamp(min=1e-9))
            able = torch.minimum(capacity, arriving + number / step)[level.caller]
            arriving.index_add_(0, level.callee, able * made[-1])
            room.index_add_(0, level.callee, slots[level.caller] * (made[-1] > 0))
        able = torch.minimum(capacity, arriving + number / step)
        most = torch.full_like(number, torch.inf)
        room = (room - held) / (2 * step)
        for level, calls in zip(reversed(self._levels), reversed(made), strict=True):
            takes = (torch.minimum(most, capacity) + room).clamp(min=0)
            share = (takes / arriving.clamp(min=1e-9))[level.callee]
            bound = torch.where((share < 1) & (calls > 0), share * able[level.caller], torch.inf)
            most.scatter_reduce_(0, level.caller.unsqueeze(1).expand_as(bound), bound, "amin")
        return most

    def of_requests(self, spans: Tensor) -> Tensor:
        """[E, K]. Of each class where its requests come in, of [S, E, K]."""
        return spans[self.entry, :, self._classes].T
