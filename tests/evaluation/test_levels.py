"""Levels of load: which target belongs to which, and that together they are all targets."""

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation import backtest
from fleetcast.evaluation.levels import LEVELS, bounds, by_level, cluster_rate, level_of
from fleetcast.models.base import Output
from fleetcast.schemas import QUANTILES
from fleetcast.windows import order
from fleetcast.windows.loader import Shards

METRICS = ("cpu", "request_rate")


@pytest.fixture
def cluster(dataset):
    """Four entities in two groups and shards of 20 steps, whose request rates add up to 200 · step."""
    values = np.random.default_rng(0).random((80, 4, 2)).astype(np.float32)
    values[:, :, 1] = 50 * np.arange(80)[:, None]
    return dataset(values, metrics=METRICS, groups=[["e0", "e1"], ["e2", "e3"]], width=20)


def test_the_rate_is_that_of_all_groups_with_every_step_counted_once(cluster):
    store, m = cluster
    assert len(m.shards) > 2
    np.testing.assert_allclose(cluster_rate(store, m), 200 * np.arange(80))


def test_entities_that_are_not_seen_are_taken_to_be_like_the_others_unless_most_are(dataset):
    values = np.full((40, 4, 2), 100, np.float32)
    values[3, 0] = np.nan
    values[4, :3] = np.nan
    store, m = dataset(values, metrics=METRICS)
    rate = cluster_rate(store, m)
    assert rate[2] == rate[3] == 400
    assert np.isnan(rate[4])
    assert level_of(rate)[4] == -1


def test_a_bound_belongs_to_the_level_below_it():
    rates = np.array([0, 1000, 1001, 2500, 5000, 8000, 8001, np.nan])
    assert level_of(rates).tolist() == [0, 0, 1, 1, 2, 3, 4, -1]


def test_fifths_of_the_time_are_equally_long_whatever_the_rates():
    rates = np.random.default_rng(0).permutation(np.geomspace(0.1, 50, 100))
    rates[7] = np.nan
    found = level_of(rates, bounds("quantiles", rates))
    assert np.unique(found, return_counts=True)[1].tolist() == [1, 20, 20, 19, 20, 20]
    lowest = [rates[found == level].min() for level in range(5)]
    assert lowest == sorted(lowest)
    assert bounds("paper", rates) == list(LEVELS)


def test_without_a_request_rate_there_are_no_levels(dataset):
    store, m = dataset(np.ones((40, 2, 2), np.float32))
    with pytest.raises(InputError, match="needs a metric request_rate, the data have cpu, memory"):
        cluster_rate(store, m)


def test_the_levels_together_are_the_whole_test(cluster):
    store, m = cluster

    def last_value(batch):
        return Output(batch.x[:, -1:].expand(-1, m.horizon, -1, -1), None)

    def batches():
        return Shards(store, m).batches(order.evaluation(m, "test", 3))

    shifts = np.zeros((4, 2, len(QUANTILES)))
    whole = backtest.measure(
        batches(), {"last": last_value}, m.scaler, QUANTILES, m.horizon, {"last": shifts}
    )["last"].scores
    steps = level_of(cluster_rate(store, m))
    found = by_level(batches(), last_value, m.scaler, QUANTILES, m.horizon, shifts, steps)
    assert len(found) == len(LEVELS)
    assert sum(of.n for of in found).tolist() == whole.n.tolist()
    np.testing.assert_allclose(sum(of.squared_error for of in found), whole.squared_error)
    # The test part is steps 64 to 79: rates of 12,800 and more.
    assert [int(of.n.sum()) for of in found[:-1]] == [0, 0, 0, 0]

    steps[64:72] = 1
    found = by_level(batches(), last_value, m.scaler, QUANTILES, m.horizon, shifts, steps)
    assert found[1].n.sum() > 0
    assert found[4].n.sum() > 0
    assert (found[1].n + found[4].n).tolist() == whole.n.tolist()
