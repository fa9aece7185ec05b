"""Replicas and nodes come, go, fail and find room as they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fleetcast.control.cluster import (
    Cluster,
    ClusterOptions,
    FaultOptions,
    LifeOptions,
    NodeClass,
    chain,
    generate,
)
from fleetcast.control.pods import ABSENT, DRAINING, PENDING, READY, STARTING, Pods

_LIFE = LifeOptions(start=20, start_sigma=0, warm_up=30, warm_speed=0.5, grace=30)


def _pods(cluster: Cluster, environments: int = 1, seed: int = 0) -> Pods:
    generator = torch.Generator().manual_seed(seed)
    return Pods(cluster, environments, generator, torch.device("cpu"))


def _phases(pods: Pods) -> list[int]:
    return sorted(pods.phase[0, 0].tolist(), reverse=True)


def _seconds_until(pods: Pods, true: Callable[[], bool], most: int = 400) -> int:
    for second in range(most):
        if true():
            return second
        pods.pass_time(1)
    raise AssertionError(f"not within {most} s")


def test_a_replica_starts_then_warms_up() -> None:
    pods = _pods(chain([0.1], max_replicas=2, life=_LIFE))
    assert _phases(pods)[:2] == [READY, ABSENT]
    pods.scale(torch.tensor([[2.0]]))
    assert _phases(pods)[:2] == [READY, PENDING]
    pods.pass_time(1)
    assert _phases(pods)[:2] == [READY, STARTING]
    assert _seconds_until(pods, lambda: _phases(pods)[:2] == [READY, READY]) == 20
    assert sorted(pods.speed()[pods.ready].tolist()) == [0.5, 1.0]
    assert _seconds_until(pods, lambda: pods.speed()[pods.ready].tolist() == [1.0, 1.0]) == 30


def test_starts_are_lognormal_within_bounds() -> None:
    life = LifeOptions(start=20, start_sigma=0.4, start_bounds=(10, 60))
    pods = _pods(chain([0.1], max_replicas=500, life=life))
    pods.scale(torch.tensor([[500.0]]))
    while (pods.phase == PENDING).any():
        pods.pass_time(1e-3)
    times = pods.timer[pods.phase == STARTING]
    assert len(times) == 499
    assert float(times.min()) >= 10 - 0.1
    assert float(times.max()) <= 60
    assert float(times.median()) == pytest.approx(20, rel=0.1)


def test_a_replica_drains_before_it_ends() -> None:
    pods = _pods(chain([0.1], replicas=2, life=_LIFE))
    pods.number[0, 0, :2] = 5
    pods.scale(torch.tensor([[1.0]]))
    assert _phases(pods)[:2] == [DRAINING, READY]
    pods.pass_time(1)
    assert _phases(pods)[:2] == [DRAINING, READY]
    pods.number[0, 0, :2] = 0
    assert float(pods.pass_time(1)) == 0
    assert _phases(pods)[:2] == [READY, ABSENT]


def test_what_is_left_after_the_grace_is_lost() -> None:
    pods = _pods(chain([0.1], replicas=2, life=_LIFE))
    pods.number[0, 0, :2] = 5
    pods.scale(torch.tensor([[1.0]]))
    lost = [float(pods.pass_time(1)) for _ in range(31)]
    assert lost == [0.0] * 29 + [5.0, 0.0]


def test_fewer_replicas_end_those_that_do_not_work_yet_then_the_youngest() -> None:
    pods = _pods(chain([0.1], replicas=2, max_replicas=4, life=_LIFE))
    pods.scale(torch.tensor([[3.0]]))
    _seconds_until(pods, lambda: int(pods.ready.sum()) == 3)
    pods.scale(torch.tensor([[4.0]]))
    pods.scale(torch.tensor([[2.0]]))
    youngest = pods.phase[0, 0].tolist().index(DRAINING)
    assert youngest == 2  # the third began last
    assert _phases(pods)[:4] == [DRAINING, READY, READY, ABSENT]


def test_wanted_replicas_are_whole_and_within_bounds() -> None:
    cluster = replace(chain([0.1], max_replicas=3), min_replicas=chain([0.1]).min_replicas)
    pods = _pods(cluster)
    for asked, wanted in ((2.6, 3), (99.0, 3), (-4.0, 1)):
        pods.scale(torch.tensor([[asked]]))
        assert float(pods.wanted) == wanted
    assert float(pods.changes) == 4


def _crowded() -> Cluster:
    """Four services with two replicas each fill the nodes."""
    nodes = (NodeClass(name="small", cores=4, speed=1),)
    options = ClusterOptions(services=4, rate=1, headroom=1, nodes=nodes, life=_LIFE)
    return generate(options)


def test_a_replica_without_room_waits_for_a_node() -> None:
    pods = _pods(_crowded())
    before = int(pods.there.sum())
    pods.scale(torch.full((1, 4), 5.0))
    pods.pass_time(1)
    assert (pods.phase == PENDING).any()
    used, room = pods.used(), torch.tensor(pods.cluster.node_cores).float()
    assert (used <= room).all()
    assert 59 <= _seconds_until(pods, lambda: int(pods.there.sum()) > before) <= 181
    _seconds_until(pods, lambda: not (pods.phase == PENDING).any())
    assert (pods.used() <= room).all()


def test_an_added_node_that_is_empty_is_given_back() -> None:
    pods = _pods(_crowded())
    before = int(pods.there.sum())
    pods.scale(torch.full((1, 4), 5.0))
    _seconds_until(pods, lambda: not (pods.phase == PENDING).any())
    assert int(pods.there.sum()) > before
    pods.scale(torch.full((1, 4), 2.0))
    _seconds_until(pods, lambda: int(pods.there.sum()) == before, most=700)


def _faulty(**faults: float) -> Pods:
    return _pods(
        replace(
            chain([0.1], replicas=100, life=_LIFE),
            faults=FaultOptions(**({"crash_rate": 0, "leak_rate": 0, "slow_rate": 0} | faults)),
        ),
        environments=10,
    )


def test_crashes_come_at_their_rate_and_lose_calls() -> None:
    pods = _faulty(crash_rate=0.5)
    pods.number[pods.ready] = 2
    lost = pods.fail(360)
    assert float(pods.restarts.sum()) == pytest.approx(1000 * 0.5 / 10, rel=0.4)
    assert float(lost.sum()) == 2 * float(pods.restarts.sum())
    assert int((pods.phase == STARTING).sum()) == int(pods.restarts.sum())


def test_a_leak_slows_a_replica_down_and_then_kills_it() -> None:
    pods = _faulty(leak_rate=1000)
    pods.fail(3600)
    assert (pods.leak[pods.ready] > 0).all()
    speeds = []
    for _ in range(3000):
        pods.pass_time(1)
        speeds.append(float(pods.speed()[pods.ready].min()) if pods.ready.any() else 1.0)
    assert min(speeds) < 0.55
    assert float(pods.restarts.sum()) > 900


def test_a_preventive_restart_takes_the_fullest_and_loses_nothing() -> None:
    pods = _pods(chain([0.1], replicas=3, life=_LIFE))
    pods.memory[0, 0, :3] = torch.tensor([0.5, 0.9, 0.4])
    pods.number[0, 0, :3] = 1
    pods.restart(torch.tensor([[True]]))
    assert pods.phase[0, 0, 1] == DRAINING
    assert _phases(pods)[:4] == [DRAINING, READY, READY, PENDING]
    assert float(pods.restarts) == 1
    pods.number.zero_()
    assert float(pods.pass_time(1)) == 0


def test_the_only_replica_is_not_restarted() -> None:
    pods = _pods(chain([0.1], life=_LIFE))
    pods.restart(torch.tensor([[True]]))
    assert _phases(pods)[0] == READY
    assert float(pods.restarts) == 0


def test_a_slow_node_slows_its_replicas_for_a_while() -> None:
    pods = _faulty(slow_rate=1e6, slow_speed=0.4, slow_time=100)
    pods.fail(15)
    assert float(pods.speed()[pods.ready].max()) == pytest.approx(0.4)
    assert _seconds_until(pods, lambda: float(pods.speed()[pods.ready].min()) == 1) == 100
