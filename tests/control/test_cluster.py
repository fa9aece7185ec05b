"""Generated clusters look like published call graphs, fit their load, and repeat by their seed."""

from __future__ import annotations

import numpy as np
import pytest
from fleetcast.control.cluster import Cluster, ClusterOptions, generate

SIZES = pytest.mark.parametrize("services", [4, 25, 100, 500])


def _cluster(services: int, seed: int = 0) -> Cluster:
    return generate(ClusterOptions(services=services, seed=seed))


@SIZES
def test_every_service_is_called_and_calls_go_one_way(services: int) -> None:
    cluster = _cluster(services)
    assert len(cluster.names) == len(set(cluster.names)) == services
    assert (cluster.caller < cluster.callee).all()
    assert (cluster.visits.sum(0) > 0).all()
    assert set(cluster.kinds) == {"gateway", "worker", "cache", "store"}
    assert all(cluster.kinds[one] == "gateway" for one in cluster.entry)


@pytest.mark.parametrize("services", [25, 100, 500])
def test_a_request_makes_some_calls_however_many_services_there_are(services: int) -> None:
    visits = _cluster(services).visits.sum(1)
    assert 2 < visits.mean() < 40


def test_out_degrees_are_heavy_tailed_and_a_few_services_are_shared() -> None:
    cluster = _cluster(500)
    out, into = np.bincount(cluster.caller, minlength=500), np.bincount(cluster.callee, minlength=500)
    assert out.max() > 8 * np.median(out[out > 0])
    assert np.median(into) <= 3
    assert 2 <= (into > 10 * np.median(into)).sum() <= 10
    assert cluster.depth.max() <= 7


def test_stores_behind_caches_get_what_these_do_not_hold() -> None:
    cluster = _cluster(100)
    of_caches = np.array([cluster.kinds[one] == "cache" for one in cluster.caller])
    assert (cluster.calls[:, of_caches] <= 0.4).all()
    assert all(cluster.kinds[one] == "store" for one in cluster.callee[of_caches])


@SIZES
def test_replicas_at_first_are_as_busy_as_is_asked_for(services: int) -> None:
    cluster = _cluster(services)
    load = cluster.rate * (cluster.share @ cluster.visits) * cluster.demand
    assert (load <= 0.6 * cluster.initial * cluster.cores + 1e-9)[cluster.initial < 16].all()
    assert (cluster.initial >= cluster.min_replicas).all()
    assert (cluster.initial <= cluster.max_replicas).all()


@SIZES
def test_nodes_of_all_classes_have_room_for_them(services: int) -> None:
    cluster = _cluster(services)
    first = cluster.node_cores[: cluster.initial_nodes]
    assert first.sum() >= 1.5 * cluster.initial @ cluster.cores
    assert set(cluster.node_class[: cluster.initial_nodes]) == {0, 1, 2}


def test_deadlines_are_out_of_reach_for_no_class() -> None:
    cluster = _cluster(25)
    assert (cluster.deadline >= 5 * cluster.visits @ cluster.demand).all()


def test_a_seed_repeats_a_cluster() -> None:
    one, two, other = _cluster(25, 1), _cluster(25, 1), _cluster(25, 2)
    for name in ("caller", "callee", "calls", "demand", "share", "node_class"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.demand, other.demand)
