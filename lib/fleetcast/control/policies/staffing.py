"""Square-root staffing: as many replicas as work alone needs, and room for its chance.

    c = a + β √a,  a = calls per second ÷ calls per second that a replica can work off

Of Poisson arrivals the load of a moment varies as √a (Erlang; Halfin and Whitt 1981), so that a small service
needs more room than a large one. A target of utilisation, c = a / target, gives both the same.
"""

from __future__ import annotations

import torch
from pydantic import Field

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Action, Observation
from fleetcast.control.policies.limits import ROUNDING, Behaviour, Limits


class StaffingOptions(Options):
    """The rule of every service."""

    room: float = Field(1.2, ge=0)
    """β."""
    behaviour: Behaviour = Behaviour()


class StaffingPolicy:
    """The rule, at each decision of all environments; what is not measured is left as it is."""

    def __init__(self, options: StaffingOptions | None = None) -> None:
        self.options = options or StaffingOptions()

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        least, most = torch.as_tensor(cluster.min_replicas), torch.as_tensor(cluster.max_replicas)
        self._limits = Limits(self.options.behaviour, least, most)
        self._capacity = torch.as_tensor(cluster.cores / cluster.demand)

    def act(self, observation: Observation) -> Action:
        """Replicas alone."""
        current = observation.wanted.double()
        load = observation.rate.double() / self._capacity
        wanted = (load + self.options.room * load.sqrt() - ROUNDING).ceil()
        recommended = torch.where(wanted.isnan(), current, wanted)
        return Action(self._limits.apply(observation.time, current, recommended).float())
