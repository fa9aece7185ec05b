"""An autoscaler sees late, noisy means with gaps, and only of replicas that were there all along."""

from __future__ import annotations

import pytest
import torch
from fleetcast.control.cluster import LifeOptions, MeasureOptions, chain
from fleetcast.control.engine import FluidEngine
from fleetcast.control.events import EventEngine
from fleetcast.control.interface import Action, Engine, Observation
from fleetcast.control.traffic import Traffic, constant

BOTH = pytest.mark.parametrize("make", [EventEngine, FluidEngine])


def _observed(engine: Engine, replicas: list[int]) -> list[Observation]:
    """What is seen before each decision for so many replicas."""
    seen = []
    for wanted in replicas:
        seen.append(engine.observe())
        engine.step(Action(torch.full((engine.environments, 1), float(wanted))))
    return seen


@BOTH
@pytest.mark.parametrize("lag", [0, 15, 45])
def test_a_change_is_seen_after_the_lag(make: type[Engine], lag: float) -> None:
    """From 60 s on there are 40 calls/s instead of 10."""
    cluster = chain([0.001], measure=MeasureOptions(lag=lag, noise=0, missing=0))
    rates = torch.where(torch.arange(60) < 12, 10.0, 40.0).reshape(1, 60, 1)
    seen = _observed(make(cluster, Traffic(rates, 5)), [1] * 12)
    first = next(one.time for one in seen if float(one.rate) > 25)
    assert first == 60 + 15 + lag
    assert all(float(one.rate) > 25 for one in seen if one.time >= first)


@BOTH
def test_before_the_first_measurement_nothing_is_known_but_the_replicas(make: type[Engine]) -> None:
    first = make(chain([0.1], replicas=3), constant(5, seconds=5)).observe()
    assert float(first.wanted) == float(first.ready) == 3
    assert float(first.measured) == 0
    for name in ("rate", "cpu", "memory", "latency_p95", "queue", "offered", "missed"):
        assert getattr(first, name).isnan().all(), name


@BOTH
def test_replicas_count_from_their_first_whole_measurement_on(make: type[Engine]) -> None:
    life = LifeOptions(start=10, start_sigma=0, warm_up=0)
    measure = MeasureOptions(lag=0, noise=0, missing=0)
    cluster = chain([0.1], max_replicas=2, life=life, measure=measure)
    seen = _observed(make(cluster, constant(5, seconds=5)), [1, 2, 2, 2, 2])
    # Asked for at 15 s, ready at 26 s: at 30 s for 4 s, at 45 s for the whole measurement.
    assert [float(one.ready) for one in seen] == [1, 1, 2, 2, 2]
    assert [float(one.measured) for one in seen] == [0, 1, 1, 2, 2]
    assert [float(one.wanted) for one in seen] == [1, 1, 2, 2, 2]
    assert float(seen[3].cpu) == pytest.approx(0.25, abs=0.15)


def test_noise_and_gaps_are_as_large_as_is_asked_for() -> None:
    cluster = chain([0.1], cores=4, measure=MeasureOptions(lag=0, noise=0.1, missing=0.2))
    engine = FluidEngine(cluster, constant(20, seconds=5, environments=500))
    cpu = torch.cat([one.cpu for one in _observed(engine, [1] * 6)[2:]])
    assert float(cpu.isnan().float().mean()) == pytest.approx(0.2, abs=0.03)
    known = cpu[~cpu.isnan()]
    assert float(known.mean()) == pytest.approx(0.5, rel=0.02)
    assert float(known.std() / known.mean()) == pytest.approx(0.1, rel=0.1)


def test_a_measurement_is_lost_as_a_whole() -> None:
    cluster = chain([0.1], measure=MeasureOptions(lag=0, missing=0.5))
    engine = FluidEngine(cluster, constant(5, seconds=5, environments=20))
    seen = _observed(engine, [1, 1])[1]
    lost = seen.rate.isnan()
    assert 0 < int(lost.sum()) < 20
    for name in ("cpu", "memory", "latency_p50", "latency_p95", "queue", "errors"):
        assert torch.equal(getattr(seen, name).isnan(), lost), name
    assert (seen.measured[lost] == 0).all()
    assert (seen.measured[~lost] == 1).all()
