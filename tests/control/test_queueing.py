"""The closed forms give the published figures, and agree with each other where they must."""

from __future__ import annotations

import numpy as np
import pytest
from fleetcast.control import queueing
from fleetcast.errors import InputError


@pytest.mark.parametrize(
    ("servers", "busy", "mean", "p95", "p99"),
    [(4, 0.8, 174.6, 473.8, 689.0), (16, 0.9, 137.0, 362.0, 527.0)],
)
def test_response_times_of_mmc(servers: int, busy: float, mean: float, p95: float, p99: float) -> None:
    rate = busy * servers / 0.1
    assert 1e3 * (0.1 + queueing.mmc_wait(servers, rate, 0.1)) == pytest.approx(mean, abs=0.5)
    assert 1e3 * queueing.mmc_quantile(0.95, servers, rate, 0.1) == pytest.approx(p95, abs=0.5)
    assert 1e3 * queueing.mmc_quantile(0.99, servers, rate, 0.1) == pytest.approx(p99, abs=0.5)


@pytest.mark.parametrize(("servers", "busy", "wait"), [(4, 0.8, 77.2), (16, 0.9, 37.6)])
def test_sakasegawas_wait(servers: int, busy: float, wait: float) -> None:
    assert 1e3 * queueing.sakasegawa_wait(servers, busy * servers / 0.1, 0.1) == pytest.approx(wait, abs=0.1)


def test_a_wider_service_time_waits_longer() -> None:
    mean = 0.1 + queueing.allen_cunneen_wait(4, 32, 0.1, arrival_scv=1, service_scv=4)
    assert 1e3 * mean == pytest.approx(286, abs=1)


@pytest.mark.parametrize(("rate", "servers"), [(20, 2), (100, 7), (500, 27), (2000, 102)])
def test_servers_for_200_ms(rate: float, servers: int) -> None:
    assert queueing.servers_for(rate, 0.05, 0.95, 0.2) == servers


def test_no_servers_are_enough_for_less_than_the_service_itself() -> None:
    with pytest.raises(InputError, match=r"0\.05 s leaves no room"):
        queueing.servers_for(10, 0.05, 0.95, 0.1)


def test_one_server() -> None:
    """M/M/1 is known in full: the wait is ρS/(1 − ρ) and the response is exponential."""
    assert queueing.erlang_c(1, 0.7) == pytest.approx(0.7)
    assert queueing.mmc_wait(1, 7, 0.1) == pytest.approx(0.7 * 0.1 / 0.3)
    assert queueing.mmc_tail(1, 1, 7, 0.1) == pytest.approx(np.exp(-3))
    assert queueing.ps_response(7, 0.1) == pytest.approx(0.1 / 0.3)
    assert queueing.ps_response(7, 0.1, size=0.2) == pytest.approx(0.2 / 0.3)


def test_erlang_b() -> None:
    """a^c/c! over the sum of these, here 3 servers at a load of 2."""
    assert queueing.erlang_b(3, 2) == pytest.approx((8 / 6) / (1 + 2 + 2 + 8 / 6))


def test_the_tail_where_two_rates_meet_is_a_limit() -> None:
    assert queueing.mmc_tail(0.2, 2, 10, 0.1) == pytest.approx(
        queueing.mmc_tail(0.2, 2, 10.0001, 0.1), rel=1e-4
    )


def test_beyond_capacity_nothing_is_answered() -> None:
    assert queueing.mmc_wait(2, 21, 0.1) == queueing.sakasegawa_wait(2, 21, 0.1) == float("inf")
    assert queueing.mmc_tail(1e9, 2, 21, 0.1) == 1
    assert queueing.mmc_quantile(0.5, 2, 21, 0.1) == float("inf")


def test_square_root_staffing() -> None:
    assert queueing.square_root_staffing(100, 1) == 110


def test_visits_are_the_traffic_equations() -> None:
    caller, callee = np.array([0, 0, 1, 2]), np.array([1, 2, 2, 3])
    calls = np.array([[1, 0.5, 2, 0.2]])
    routing = np.zeros((4, 4))
    routing[caller, callee] = calls[0]
    visits = queueing.visit_ratios(np.array([0]), caller, callee, calls, 4)
    np.testing.assert_allclose(30 * visits[0], queueing.traffic(np.array([30.0, 0, 0, 0]), routing))
    np.testing.assert_allclose(visits, [[1, 1, 2.5, 0.5]])


def test_a_backlog_grows_and_drains() -> None:
    backlog = queueing.fluid_backlog(120, 100, 60)
    assert backlog == 1200
    assert queueing.drain_time(backlog, 120, 160) == 30
    assert queueing.drain_time(backlog, 120, 120) == float("inf")
