"""Calibration never ends below the defaults; TransLB sends more to what answers sooner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.environment import EnvironmentOptions
from fleetcast.control.policies.calibrate import CalibrateOptions, calibrate, draw_kubernetes
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.control.policies.staffing import StaffingOptions, StaffingPolicy
from fleetcast.control.policies.translb import TranslbOptions, TranslbPolicy, train
from fleetcast.control.traffic import Traffic
from fleetcast.errors import InputError


@pytest.fixture(scope="module")
def small() -> tuple[Cluster, Traffic]:
    cluster = generate(ClusterOptions(services=6, classes=1))
    options = traffic.TrafficOptions(patterns=("bursts",), hours=0.5)
    return cluster, traffic.generate(options, cluster, 2)


def test_calibration_keeps_its_budget_and_is_repeatable(small: tuple[Cluster, Traffic]) -> None:
    cluster, rates = small
    options = CalibrateOptions(decisions=4 * 240 + 7, objective=EnvironmentOptions(step=5))
    runs = [
        calibrate(KubernetesPolicy, draw_kubernetes, KubernetesOptions(), cluster, rates, options)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].tried) == 4 and runs[0].decisions == 960
    rewards = [reward for _, reward in runs[0].tried]
    assert dict(zip(rewards, (one for one, _ in runs[0].tried), strict=True))[max(rewards)] == runs[0].best
    assert runs[0].tried[0][0] == KubernetesOptions()


def test_a_budget_below_one_run_is_refused(small: tuple[Cluster, Traffic]) -> None:
    with pytest.raises(InputError, match=r"a budget of 10 decisions, expected at least 240 for one run"):
        calibrate(
            KubernetesPolicy, draw_kubernetes, KubernetesOptions(), *small, CalibrateOptions(decisions=10)
        )


def test_translb_weights_faster_nodes_more_and_empty_ones_not_at_all(small: tuple[Cluster, Traffic]) -> None:
    cluster, rates = small
    balancer = train(TranslbOptions(intervals=40, steps=150), KubernetesPolicy(), rates, cluster)
    policy = TranslbPolicy(balancer, KubernetesPolicy())
    policy.reset(cluster, 2)
    engine = FluidEngine(cluster, rates, step=5, seed=3)
    slow, fast = [], []
    for _ in range(30):
        seen = engine.observe()
        action = policy.act(seen)
        assert action.routing is not None
        there = seen.ready_by_class > 0
        assert (action.routing[~there] == 0).all()
        assert torch.allclose(action.routing.sum(2)[there.any(2)], torch.tensor(1.0))
        both = there[..., 0] & there[..., 2]
        slow.append(action.routing[..., 0][both])
        fast.append(action.routing[..., 2][both])
        engine.step(action)
    assert torch.cat(fast[5:]).mean() > 1.15 * torch.cat(slow[5:]).mean()


def test_translb_follows_its_weights_as_far_as_it_is_told(small: tuple[Cluster, Traffic]) -> None:
    cluster, rates = small
    balancer = train(TranslbOptions(intervals=40, steps=50), KubernetesPolicy(), rates, cluster)
    seen = FluidEngine(cluster, rates, step=5, seed=3).observe()
    weights = {}
    for exponent in (0.0, 0.5, 1.0):
        policy = TranslbPolicy(balancer, KubernetesPolicy(), exponent)
        policy.reset(cluster, 2)
        weights[exponent] = policy.act(seen).routing
    there = seen.ready_by_class > 0
    assert torch.equal(weights[0.0], there.float())
    assert torch.allclose(weights[0.5] ** 2, weights[1.0], atol=1e-6)


def test_square_root_staffing_gives_small_services_more_room(small: tuple[Cluster, Traffic]) -> None:
    """a + β √a replicas: of a load of 1, 4 and 9 replicas, with β 1.5, 3, 7 and 14."""
    cluster, rates = small
    engine = FluidEngine(cluster, rates, step=5)
    seen = engine.observe()
    load = torch.tensor([1.0, 4.0, 9.0, float("nan"), 0.0, 1.0])
    seen = replace(seen, rate=(load * torch.tensor(cluster.cores / cluster.demand)).repeat(2, 1))
    policy = StaffingPolicy(StaffingOptions(room=1.5))
    policy.reset(replace(cluster, max_replicas=np.full(6, 99)), 2)
    asked = policy.act(replace(seen, wanted=torch.full((2, 6), 12.0))).replicas[0].tolist()
    least = cluster.min_replicas.tolist()
    assert asked == [max(3, least[0]), 7, 14, 12, least[4], max(3, least[5])]
