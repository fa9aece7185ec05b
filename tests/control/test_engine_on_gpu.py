"""The vectorised engine on a GPU: the same cluster as on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, FaultOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import Action, Observation, run, total
from policies import Keep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NO_FAULTS = FaultOptions(crash_rate=0, leak_rate=0, slow_rate=0)


class Target:
    """Replicas for a CPU use of 30 %, wherever the measurements are."""

    def reset(self, cluster: Cluster, environments: int) -> None: ...

    def act(self, seen: Observation) -> Action:
        wanted = (seen.ready * seen.cpu / 0.3).ceil()
        return Action(torch.where(wanted.isnan(), seen.wanted, wanted))


def test_without_chance_both_devices_come_to_the_same():
    cluster = replace(generate(ClusterOptions(services=12)), faults=NO_FAULTS)
    rates = traffic.generate(traffic.TrafficOptions(hours=0.5), cluster, environments=6)
    here, there = (
        total(run(FluidEngine(cluster, rates, device=device), Keep(), 100)) for device in ("cpu", "cuda")
    )
    for field in fields(here):
        ours, theirs = getattr(here, field.name), getattr(there, field.name).cpu()
        assert torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max())), field.name


def test_a_rule_scales_on_a_gpu_as_on_the_cpu():
    """Start-up times and noise are drawn anew by each device; means over many environments agree."""
    cluster = generate(ClusterOptions(services=12))
    rates = traffic.generate(traffic.TrafficOptions(hours=0.5), cluster, environments=48)
    here, there = (
        total(run(FluidEngine(cluster, rates, device=device), Target(), 100)) for device in ("cpu", "cuda")
    )
    for name, close in (("offered", 0.001), ("cpu_used", 0.03), ("cpu_allocated", 0.03), ("good", 0.05)):
        ours, theirs = (float(getattr(one, name).sum()) for one in (here, there))
        assert theirs == pytest.approx(ours, rel=close), name
