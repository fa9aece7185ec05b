"""Preventive restarts beside any policy: what uses too much memory is started anew before it is killed."""

from __future__ import annotations

from dataclasses import replace

from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Action, Observation, Policy


class WithRestarts:
    """Another policy's replicas and routing; a restart where a replica's memory is above `memory`."""

    def __init__(self, policy: Policy, memory: float) -> None:
        """`memory` as share of the limit."""
        self._policy, self._memory = policy, memory

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._policy.reset(cluster, environments)

    def act(self, observation: Observation) -> Action:
        """Replicas, routing and restarts."""
        return replace(self._policy.act(observation), restart=observation.memory > self._memory)
