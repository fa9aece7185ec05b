"""Both engines agree with the closed forms, and with each other, within the tolerances given here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fleetcast.control import queueing, traffic
from fleetcast.control.cluster import (
    Balancer,
    Cluster,
    ClusterOptions,
    FaultOptions,
    MeasureOptions,
    chain,
    generate,
)
from fleetcast.control.engine import FluidEngine
from fleetcast.control.events import EventEngine
from fleetcast.control.interface import Engine, Outcome, run, total
from fleetcast.control.traffic import Traffic
from fleetcast.errors import InputError
from policies import Keep

EVENTS, FLUID = EventEngine, FluidEngine
BOTH = pytest.mark.parametrize("make", [EVENTS, FLUID])
_NO_FAULTS = FaultOptions(crash_rate=0, leak_rate=0, slow_rate=0)
_EXACT = MeasureOptions(noise=0, missing=0)


def _settled(make: type[Engine], cluster: Cluster, rates: Traffic, intervals: int) -> Outcome:
    """What came of some intervals after the first four. One environment of the vectorised engine settles soon
    and has no chance in it."""
    intervals = min(intervals, 20) if make is FLUID else intervals
    return total(run(make(cluster, rates), Keep(), 4 + intervals)[4:])


def _steady(cluster: Cluster, level: float) -> Traffic:
    """The rate that it is made for, times `level`, in its usual mix, all the time."""
    return Traffic(torch.tensor(cluster.share * cluster.rate * level).float().reshape(1, 1, -1), 5)


def _mean(outcome: Outcome) -> float:
    return float(outcome.latency / outcome.answered)


# -- closed forms --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("cv", "busy"), [(0.5, 0.5), (2.0, 0.7)])
def test_one_core_that_is_shared_does_not_mind_how_calls_vary(
    make: type[Engine], cv: float, busy: float
) -> None:
    got = _mean(_settled(make, chain([0.05], cv=cv), traffic.constant(busy / 0.05, seconds=5), 120))
    tolerance = 0.01 if make is FLUID else 0.08
    assert got == pytest.approx(queueing.ps_response(busy / 0.05, 0.05), rel=tolerance)


@BOTH
def test_one_core_first_come_first_served_minds(make: type[Engine]) -> None:
    """Pollaczek and Khinchine's mean."""
    cluster = chain([0.05], cv=2, slots=1)
    got = _mean(_settled(make, cluster, traffic.constant(12, seconds=5), 150))
    expected = 0.05 + queueing.allen_cunneen_wait(1, 12, 0.05, arrival_scv=1, service_scv=4)
    assert got == pytest.approx(expected, rel=0.02 if make is FLUID else 0.15)


@BOTH
@pytest.mark.parametrize(("cores", "busy"), [(4, 0.8), (16, 0.9)])
def test_many_cores_are_erlangs(make: type[Engine], cores: int, busy: float) -> None:
    rate = busy * cores / 0.1
    got = _mean(_settled(make, chain([0.1], cores=cores), traffic.constant(rate, seconds=5), 30))
    assert got == pytest.approx(0.1 + queueing.mmc_wait(cores, rate, 0.1), rel=0.02 if make is FLUID else 0.1)


@BOTH
def test_replicas_that_are_chosen_at_random_are_queues_of_their_own(make: type[Engine]) -> None:
    cluster = chain([0.1], replicas=4, balancer="random")
    got = _mean(_settled(make, cluster, traffic.constant(28, seconds=5), 100))
    assert got == pytest.approx(queueing.ps_response(7, 0.1), rel=0.01 if make is FLUID else 0.1)


@BOTH
def test_means_add_along_a_chain(make: type[Engine]) -> None:
    demands = [0.02, 0.05, 0.03]
    got = _mean(_settled(make, chain(demands), traffic.constant(12, seconds=5), 120))
    expected = sum(queueing.ps_response(12, one) for one in demands)
    assert got == pytest.approx(expected, rel=0.01 if make is FLUID else 0.1)


@BOTH
def test_calls_are_the_visit_ratios(make: type[Engine]) -> None:
    cluster = generate(ClusterOptions(services=10, rate=100, faults=_NO_FAULTS, measure=_EXACT, seed=3))
    engine = make(cluster, _steady(cluster, 1))
    outcome = total(run(engine, Keep(), 8)[2:])
    used = float(outcome.cpu_used / outcome.seconds)
    speeds = [one.speed for one in cluster.node_classes]
    needed = cluster.rate * float(cluster.share @ cluster.visits @ cluster.demand)
    assert needed / max(speeds) < used < needed / min(speeds)
    seen = engine.observe().rate[0]
    expected = torch.tensor(cluster.rate * cluster.share @ cluster.visits).float()
    torch.testing.assert_close(seen, expected, rtol=0.1, atol=0.05 * cluster.rate)


@BOTH
def test_an_overload_grows_and_drains_as_a_fluid(make: type[Engine]) -> None:
    """120 calls/s at a capacity of 100 for a minute leave 1,200; another core drains them in 15 s."""
    cluster = chain([0.01], max_replicas=2)
    engine = make(cluster, traffic.constant(120, seconds=5))
    run(engine, Keep(), 4)
    truth = engine.observe(truth=True).truth
    assert truth is not None
    assert float(truth.queue) == pytest.approx(queueing.fluid_backlog(120, 100, 60), rel=0.2)
    run(engine, Keep([2]), 6)  # it starts within 60 s
    left = engine.observe(truth=True).truth
    assert left is not None
    assert float(left.queue) < 20


@BOTH
def test_work_is_conserved(make: type[Engine]) -> None:
    outcome = _settled(make, chain([0.02]), traffic.constant(30, seconds=5), 60)
    assert float(outcome.cpu_used / outcome.cpu_allocated) == pytest.approx(0.6, rel=0.06)
    assert float(outcome.answered) == pytest.approx(float(outcome.offered), rel=0.01)
    assert float(outcome.latencies.sum()) == pytest.approx(float(outcome.answered), rel=1e-4)


@BOTH
def test_what_a_service_holds_is_the_time_that_requests_spend_there(make: type[Engine]) -> None:
    """Little's law, service by service; together they are the latency."""
    outcome = _settled(make, chain([0.02, 0.04, 0.01]), traffic.constant(15, seconds=5), 60)
    held = (outcome.held / outcome.answered).squeeze(0)
    expected = [work / (1 - 15 * work) for work in (0.02, 0.04, 0.01)]
    assert held.tolist() == pytest.approx(expected, rel=0.15)
    assert float(held.sum()) == pytest.approx(_mean(outcome), rel=0.02)


@BOTH
def test_without_a_place_calls_are_refused_and_tried_again_within_the_budget(make: type[Engine]) -> None:
    cluster = chain([0.1], slots=4, queue_limit=4, retries=1, deadline=5)
    outcome = _settled(make, cluster, traffic.constant(40, seconds=5), 20)
    assert float(outcome.answered / outcome.seconds) == pytest.approx(10, rel=0.05)  # what a core can do
    tried = float((outcome.offered + outcome.retried) / outcome.seconds)
    # 40 (1 + p) attempts, of which a share p fails: all but 10 a second.
    assert tried == pytest.approx(40 + 40 * 0.866, rel=0.06)
    assert float(outcome.failed / outcome.seconds) == pytest.approx(tried - 10, rel=0.02)


# -- each other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("balancer", "level"), [("p2c", 1.0), ("round_robin", 0.7), ("random", 0.7)])
def test_engines_agree_on_a_cluster(balancer: Balancer, level: float) -> None:
    options = ClusterOptions(services=12, rate=100, balancer=balancer, min_replicas=1, faults=_NO_FAULTS)
    cluster = generate(options)
    events, fluid = (_settled(make, cluster, _steady(cluster, level), 20) for make in (EVENTS, FLUID))
    assert _mean(fluid) == pytest.approx(_mean(events), rel=0.12)
    for q, tolerance in ((0.5, 0.15), (0.95, 0.2), (0.99, 0.3)):
        assert float(fluid.quantile(q)) == pytest.approx(float(events.quantile(q)), rel=tolerance)
    for name in ("answered", "good", "cpu_used"):
        assert float(getattr(fluid, name)) == pytest.approx(float(getattr(events, name)), rel=0.05)
    assert float(fluid.cpu_allocated) == float(events.cpu_allocated)


def test_engines_agree_when_a_slow_service_fills_its_callers() -> None:
    """Held slots bring the whole cluster down, with services at rest beside the one that is full."""
    cluster = generate(ClusterOptions(services=12, rate=100, min_replicas=1, faults=_NO_FAULTS, seed=1))
    events, fluid = (_settled(make, cluster, _steady(cluster, 3), 10) for make in (EVENTS, FLUID))
    assert float(events.good / events.offered) < 0.1
    assert float(fluid.good / fluid.offered) < 0.1
    assert float(fluid.answered) == pytest.approx(float(events.answered), rel=0.1)
    assert float(fluid.cpu_used) == pytest.approx(float(events.cpu_used), rel=0.1)
    assert _mean(fluid) == pytest.approx(_mean(events), rel=0.2)


@BOTH
def test_weights_of_node_classes_move_the_load(make: type[Engine]) -> None:
    cluster = generate(
        ClusterOptions(services=4, rate=400, balancer="random", faults=_NO_FAULTS, measure=_EXACT)
    )
    services, zones = len(cluster.names), len(cluster.node_classes)
    weights = torch.ones(1, services, zones)
    weights[:, :, 0] = 0.1
    engine = make(cluster, _steady(cluster, 0.3))
    run(engine, Keep(routing=weights), 6)
    seen = engine.observe()
    both = (seen.ready_by_class[0, :, 0] > 0) & (seen.ready_by_class[0, :, 1:].sum(1) > 0)
    assert both.any()
    of_old, of_new = seen.cpu_by_class[0, both, 0], seen.cpu_by_class[0, both, 1:].nanmean(1)
    assert (of_old < 0.5 * of_new).all()


@BOTH
def test_a_seed_repeats_a_run(make: type[Engine]) -> None:
    cluster = generate(ClusterOptions(services=6, rate=50))
    rates = traffic.generate(traffic.TrafficOptions(hours=0.1), cluster)
    one, two, other = (total(run(make(cluster, rates, seed=seed), Keep(), 6)) for seed in (1, 1, 2))  # type: ignore[call-arg]
    assert torch.equal(one.latencies, two.latencies)
    assert torch.equal(one.restarts, two.restarts)
    if make is EVENTS:
        assert not torch.equal(one.latencies, other.latencies)


def test_environments_do_not_touch_each_other() -> None:
    cluster = generate(ClusterOptions(services=6, rate=50, faults=_NO_FAULTS))
    rates = traffic.generate(traffic.TrafficOptions(hours=0.1), cluster, 3)
    together = total(run(FluidEngine(cluster, rates), Keep(), 6))
    alone = total(run(FluidEngine(cluster, Traffic(rates.rates[2:], rates.step)), Keep(), 6))
    torch.testing.assert_close(together.latency[2:], alone.latency, rtol=1e-4, atol=0)


def test_a_coarser_step_gives_the_same_steady_state() -> None:
    cluster = generate(ClusterOptions(services=12, rate=150, faults=_NO_FAULTS))
    fine, coarse = (
        total(run(FluidEngine(cluster, _steady(cluster, 1), step=step), Keep(), 20)[4:]) for step in (1, 5)
    )
    assert _mean(coarse) == pytest.approx(_mean(fine), rel=0.02)
    assert float(coarse.good) == pytest.approx(float(fine.good), rel=0.01)


def test_what_does_not_fit_is_refused() -> None:
    cluster = chain([0.1])
    with pytest.raises(InputError, match=r"a step of 4 s, expected a whole part of 15"):
        FluidEngine(cluster, traffic.constant(1, seconds=5), step=4)
    wide = Traffic(torch.ones(1, 1, 2), 5)
    with pytest.raises(InputError, match="2 classes"):
        FluidEngine(cluster, wide)
    with pytest.raises(InputError, match="2 classes"):
        EventEngine(cluster, wide)


def test_quantiles_of_an_outcome_lie_within_their_bins() -> None:
    outcome = total(run(EventEngine(chain([0.1]), traffic.constant(5, seconds=5)), Keep(), 40))
    quantiles = [float(outcome.quantile(q)) for q in (0.1, 0.5, 0.9, 0.99)]
    assert quantiles == sorted(quantiles)
    assert 0.05 < quantiles[1] < 0.2
    nothing = replace(outcome, latencies=torch.zeros_like(outcome.latencies))
    assert nothing.quantile(0.5).isnan()
