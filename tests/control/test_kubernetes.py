"""The rule of the HorizontalPodAutoscaler, by its documentation's and its source's own examples."""

from __future__ import annotations

import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import ClusterOptions, chain, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import run, total
from fleetcast.control.policies.kubernetes import (
    KubernetesOptions,
    KubernetesPolicy,
    average_value,
    external_value,
    pods_metric,
    utilisation,
)
from fleetcast.control.policies.limits import Behaviour, Limits, ScalingPolicy, ScalingRules
from torch import Tensor


def number(value: float) -> Tensor:
    return torch.tensor([[float(value)]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("ready", "percent", "unready", "missing", "current", "target", "expected"),
    [
        (50, 90, 0, 0, 50, 75, 60),
        (4, 100, 0, 0, 4, 50, 8),
        (4, 100, 4, 0, 8, 50, 8),  # those that start will take their share: no overshoot
        (8, 90, 4, 0, 12, 50, 15),
        (10, 55, 0, 0, 10, 50, 10),  # exactly at the tolerance
        (10, 55.9, 0, 0, 10, 50, 10),  # whole percents, rounded down
        (10, 56, 0, 0, 10, 50, 12),
        (10, 44, 0, 0, 10, 50, 9),
        (4, 20, 0, 2, 6, 50, 6),  # missing ones might be fully busy: no scaling in
        (8, 20, 0, 1, 9, 50, 6),
        (4, 100, 0, 2, 6, 50, 8),  # and might be idle: 67 % of six
        (4, 60, 0, 2, 6, 50, 6),  # which turns the direction
    ],
)
def test_cpu_with_unready_and_missing_replicas(
    ready: int, percent: float, unready: int, missing: int, current: int, target: float, expected: int
) -> None:
    usage = number(ready * percent / 100)
    found = utilisation(
        usage, number(ready), number(current), target, unready=number(unready), missing=number(missing)
    )
    assert found.item() == expected


def test_a_pods_metric_counts_missing_replicas_with_the_target_when_scaling_in() -> None:
    by_pods = pods_metric(number(8 * 20), number(8), number(10), 50, missing=number(2))
    by_cpu = utilisation(number(8 * 0.2), number(8), number(10), 50, missing=number(2))
    assert (by_pods.item(), by_cpu.item()) == (6, 8)  # 260 of 50 each, against 3.6 of 0.5 each


@pytest.mark.parametrize(
    ("current", "asked", "kept"), [(10, 11, 10), (10, 12, 12), (20, 22, 20), (20, 18, 20), (81, 89, 81)]
)
def test_an_external_average_value(current: int, asked: int, kept: int) -> None:
    assert average_value(number(asked), 1.0, number(current), number(current)).item() == kept


def test_an_external_value_scales_the_ready_replicas_and_wakes_up_from_zero() -> None:
    assert external_value(number(30), 10.0, number(4), number(5)).item() == 12
    assert external_value(number(30), 10.0, number(0), number(0)).item() == 3


def limits(behaviour: Behaviour, most: int = 1000) -> Limits:
    return Limits(behaviour, torch.tensor([1]), torch.tensor([most]))


def follow(limit: Limits, current: float, recommended: list[float], every: float = 15) -> list[int]:
    found = []
    for step, one in enumerate(recommended):
        current = limit.apply(step * every, number(current), number(one)).item()
        found.append(int(current))
    return found


def test_the_default_rate_limit_doubles_or_adds_four() -> None:
    assert follow(limits(Behaviour()), 4, [50] * 5) == [8, 16, 32, 50, 50]
    assert follow(limits(Behaviour()), 1, [50] * 3) == [5, 10, 20]
    assert follow(limits(Behaviour(), most=20), 4, [50] * 4) == [8, 16, 20, 20]


def test_scaling_in_by_the_larger_of_two_policies() -> None:
    policies = (
        ScalingPolicy(kind="percent", value=10, period=60),
        ScalingPolicy(kind="pods", value=4, period=60),
    )
    behaviour = Behaviour(down=ScalingRules(window=0, policies=policies))
    found = follow(limits(behaviour), 80, [10] * 13, every=60)
    assert found == [72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16, 12]


def test_within_a_period_only_what_is_left_of_it_may_change() -> None:
    four_a_minute = ScalingRules(window=0, policies=(ScalingPolicy(kind="pods", value=4, period=60),))
    found = follow(limits(Behaviour(up=four_a_minute)), 2, [20] * 6)
    assert found == [6, 6, 6, 6, 10, 10]


def test_the_window_holds_replicas_until_the_last_high_recommendation_has_left_it() -> None:
    found = follow(limits(Behaviour()), 20, [20, 20] + [5] * 20)
    assert found[20] == 20, "t = 300"
    assert found[21] == 5, "t = 315: that of t = 15 has left"


def test_a_window_upwards_waits_for_the_least_recommendation() -> None:
    slow = Behaviour(up=ScalingRules(window=30, policies=(ScalingPolicy(kind="pods", value=99, period=15),)))
    assert follow(limits(slow), 5, [5, 20, 20, 20]) == [5, 5, 20, 20]


def test_a_disabled_direction_does_not_scale() -> None:
    never = Behaviour(down=ScalingRules(window=0, select="disabled", policies=Behaviour().down.policies))
    assert follow(limits(never), 9, [1, 1]) == [9, 9]


@pytest.mark.parametrize("metric", ["cpu", "rate"])
def test_in_the_simulator_utilisation_settles_at_the_target(metric: str) -> None:
    cluster = chain([0.01], replicas=2, cores=1, max_replicas=40)
    engine = FluidEngine(cluster, traffic.constant(1000, seconds=1800), step=1)
    policy = KubernetesPolicy(KubernetesOptions(metric=metric, target=50))  # type: ignore[arg-type]
    outcome = total(run(engine, policy, 120)[-20:])
    assert (outcome.cpu_used / outcome.cpu_allocated).item() == pytest.approx(0.5, rel=0.12)


def test_nothing_is_changed_where_nothing_is_measured() -> None:
    cluster = generate(ClusterOptions(services=6))
    engine = FluidEngine(cluster, traffic.generate(traffic.TrafficOptions(hours=0.1), cluster))
    policy = KubernetesPolicy()
    policy.reset(cluster, 1)
    first = engine.observe()
    assert first.cpu.isnan().all()
    assert torch.equal(policy.act(first).replicas, first.wanted)
