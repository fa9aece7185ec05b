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
    """The edges from callers of one depth."""

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
        depth = cluster.depth[cluster.caller]
        self.entry = torch.from_numpy(cluster.entry).to(device)
        self._classes = torch.arange(len(cluster.entry), device=device)
        self._services = len(cluster.names)
        self._levels = []
        for level in range(int(depth.max(initial=-1)) + 1):
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

    def of_requests(self, spans: Tensor) -> Tensor:
        """[E, K]. Of each class where its requests come in, of [S, E, K]."""
        return spans[self.entry, :, self._classes].T
