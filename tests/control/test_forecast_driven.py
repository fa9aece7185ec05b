"""Policies that scale by a forecast differ by the forecast alone; measures add up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, chain, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import Action
from fleetcast.control.measures import figures, judge, over_seeds
from fleetcast.control.policies.capacity import CapacityCurve
from fleetcast.control.policies.forecast_driven import (
    Clairvoyant,
    Forecast,
    ForecastPolicy,
    LastValue,
    LstmForecast,
    LstmOptions,
    PublishedQuantile,
    SameTimeYesterday,
    Schedule,
)
from fleetcast.control.queueing import mmc_wait
from fleetcast.control.traffic import Traffic
from fleetcast.errors import InputError


def test_the_curve_keeps_its_objective_in_the_closed_form() -> None:
    cluster = chain([0.1], cores=1, balancer="random", max_replicas=8)
    rates = CapacityCurve.of(cluster, 1.5).rates[0]
    # Each replica is an M/M/1 of its own: a stretch of 1.5 is a utilisation of a third.
    assert rates.numpy() == pytest.approx(np.arange(1, 9) * 10 / 3, rel=1e-6)
    assert 1 + mmc_wait(1, float(rates[0]), 0.1) / 0.1 == pytest.approx(1.5)


def test_replicas_are_the_least_that_carry_the_load() -> None:
    curve = CapacityCurve(torch.tensor([[10.0, 25.0, 40.0], [1.0, 2.0, 3.0]]))
    asked = curve.replicas(torch.tensor([[10.0, 1.5], [10.1, float("nan")], [99.0, 0.0]]))
    assert asked[:, 0].tolist() == [1, 2, 3]
    assert asked[0, 1] == 2 and asked[1, 1].isnan() and asked[2, 1] == 1


def test_an_objective_without_any_waiting_is_refused() -> None:
    with pytest.raises(InputError, match=r"stretch 1, expected more than 1"):
        CapacityCurve.of(chain([0.1]), 1)


@pytest.fixture(scope="module")
def steps() -> tuple[Cluster, Traffic]:
    """A load that trebles for half of every 20 minutes."""
    cluster = chain([0.01], replicas=3, cores=1, max_replicas=24, balancer="p2c", deadline=0.2)
    place = torch.arange(4 * 240)
    rate = torch.where(place % 240 < 120, 100.0, 300.0)
    return cluster, Traffic(rate.view(1, -1, 1).repeat(2, 1, 1), 5)


def run(forecast: Forecast, steps: tuple[Cluster, Traffic]) -> dict[str, float]:
    cluster, rates = steps
    outcome, provision = judge(
        FluidEngine(cluster, rates, step=5), ForecastPolicy(forecast), 240, truth=forecast.truth
    )
    return {name: float(value.mean()) for name, value in figures(outcome, provision, 15).items()}


def test_who_knows_the_future_misses_less_than_who_knows_the_present(steps: tuple[Cluster, Traffic]) -> None:
    present, future = run(LastValue(), steps), run(Clairvoyant(), steps)
    yesterday = run(SameTimeYesterday(1200), steps)
    assert future["under"] < yesterday["under"] < present["under"]
    assert future["missed"] < yesterday["missed"] < present["missed"]
    assert present["recovery"] >= 15


def test_a_published_forecast_that_comes_true_is_as_good_as_clairvoyance(
    steps: tuple[Cluster, Traffic],
) -> None:
    cluster, rates = steps
    start = datetime(2025, 1, 1, tzinfo=UTC)
    by_minute = rates.rates[0, ::12, 0].numpy()
    times = [start + timedelta(minutes=number) for number in range(len(by_minute))]
    observed = pl.DataFrame({"time": times, "request_rate": by_minute})
    forecast = pl.DataFrame({"time": times, "q90": by_minute})
    replayed = Schedule.of_forecast(forecast, observed, "q90", float(by_minute.mean()), cluster)
    assert run(replayed, steps)["under"] == pytest.approx(run(Clairvoyant(), steps)["under"], abs=0.3)


def test_the_lstm_learns_a_wave_that_the_last_value_lags_behind() -> None:
    cluster = generate(ClusterOptions(services=4, classes=1))
    options = traffic.TrafficOptions(
        patterns=("sine",), period=0.25, amplitude=0.9, hours=2, arrivals="poisson"
    )
    rates = traffic.generate(options, cluster, 2)
    small = LstmOptions(history=16, horizon=4, hidden=16, steps=250, batch=16, quantile=0.5, rate=1e-2)
    lstm = LstmForecast(small, rates, cluster)
    unseen = traffic.generate(options.model_copy(update={"seed": 9}), cluster)
    engine = FluidEngine(cluster, unseen, step=5)
    policy = ForecastPolicy(LastValue())
    policy.reset(cluster, 1)
    lstm.reset(cluster, 1)
    errors = []
    for _ in range(120):
        seen = engine.observe(truth=True)
        assert seen.truth is not None
        true = seen.truth.ahead[:, :4].amax(1)
        pair = torch.stack([(lstm.highest(seen, 4) - true).abs(), (seen.rate - true).abs()])
        errors.append(pair / torch.as_tensor(cluster.rate * (cluster.share @ cluster.visits)))
        engine.step(policy.act(seen))
    by_lstm, by_last = torch.stack(errors).nanmean((0, 2, 3))
    assert by_lstm < 0.6 * by_last


def test_intervals_are_students_and_leave_out_what_was_not_counted() -> None:
    interval = over_seeds([1, 2, 3, 4, 5, np.nan])
    assert (interval.mean, interval.width) == pytest.approx((3, 1.963), abs=1e-3)
    assert over_seeds([7]).width == np.inf


def test_a_published_quantile_is_above_what_comes_as_often_as_it_says() -> None:
    cluster = generate(ClusterOptions(services=6, classes=1))
    options = traffic.TrafficOptions(patterns=("sine",), hours=1.5, period=0.5)
    training, later = (
        traffic.generate(options.model_copy(update={"seed": seed}), cluster, 3) for seed in (0, 100)
    )
    forecast = PublishedQuantile(0.5 * 3600, 0.9, training, cluster)
    engine = FluidEngine(cluster, later, step=15, seed=1)
    forecast.reset(cluster, 3)
    told, came = [], []
    for _ in range(300):
        seen = engine.observe(truth=True)
        assert seen.truth is not None
        told.append(forecast.highest(seen, 1))
        came.append(seen.truth.ahead[:, 0])
        engine.step(Action(seen.wanted))
    above = torch.stack(told)[150:] >= torch.stack(came)[150:]
    assert float(above.float().mean()) == pytest.approx(0.9, abs=0.05)


def test_a_period_as_long_as_the_traffic_is_refused() -> None:
    cluster = generate(ClusterOptions(services=4, classes=1))
    rates = traffic.generate(traffic.TrafficOptions(hours=1), cluster, 1)
    with pytest.raises(InputError, match=r"traffic of 240 intervals, expected more than the period of 240"):
        PublishedQuantile(3600, 0.9, rates, cluster)
