"""Policies for tests."""

from __future__ import annotations

import torch
from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Action, Observation
from torch import Tensor


class Keep:
    """As many replicas as there are at first, or as given [S]."""

    def __init__(self, replicas: list[int] | None = None, routing: Tensor | None = None) -> None:
        self._given, self._routing = replicas, routing

    def reset(self, cluster: Cluster, environments: int) -> None:
        replicas = cluster.initial if self._given is None else self._given
        self._replicas = torch.as_tensor(replicas).float().repeat(environments, 1)

    def act(self, observation: Observation) -> Action:
        return Action(self._replicas, self._routing)
