"""What the figures of high load mean, counted by hand and in any split of the windows."""

from __future__ import annotations

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation import peaks
from fleetcast.evaluation.metrics import ABSOLUTE, COUNT
from fleetcast.evaluation.peaks import Peaks

LEVELS = (0.5, 0.9)
B, H, N, F = 23, 5, 4, 2


def one(y, median, high=None, limit=0.8, mean=None, seen=None):
    """The state of one window of one entity and metric; `high` is its 90 % quantile."""

    def shaped(values):
        return np.asarray(values, float)[None, :, None, None]

    y, median = shaped(y), shaped(median)
    high = median if high is None else shaped(high)
    mean = median if mean is None else shaped(mean)
    seen = np.isfinite(y) if seen is None else shaped(seen) > 0
    return Peaks.of(y, seen, mean, median, np.stack([median, high], -1), LEVELS, [[limit]])


def test_errors_on_high_load_count_only_what_lies_above_the_threshold():
    found = one([0.1, 0.9, 1.0], [0.5, 0.8, 0.6], mean=[0.5, 1.0, 0.7])
    assert found.n.item() == 2
    assert peaks.mae(found).item() == pytest.approx((0.1 + 0.4) / 2)
    assert peaks.bias(found).item() == pytest.approx((0.1 - 0.3) / 2), "of the mean, forecast − target"


def test_an_alarm_is_right_if_the_load_passes_the_threshold_at_any_step():
    event, calm = [0.1, 0.9, 0.2], [0.1, 0.2, 0.3]
    low, high = [0.5, 0.5, 0.5], [0.9, 0.5, 0.5]
    found = one(event, low, high) + one(event, high) + one(calm, low, high) + one(calm, low) + one(calm, low)
    assert found.events.item() == 2
    assert found.alarms.tolist() == [[1, 3]] and found.hits.tolist() == [[1, 2]]
    assert peaks.misses(found).tolist() == [[1, 0]] and peaks.false_alarms(found).tolist() == [[0, 1]]
    np.testing.assert_allclose(peaks.precision(found), [[1, 2 / 3]])
    np.testing.assert_allclose(peaks.recall(found), [[0.5, 1]])


def test_a_load_at_the_threshold_is_not_above_it():
    found = one([0.8, 0.8], [0.8, 0.7])
    assert (found.n.item(), found.events.item(), found.alarms.sum()) == (0, 0, 0)
    assert np.isnan(peaks.mae(found)).all() and np.isnan(peaks.precision(found)).all()


def test_steps_that_nobody_observed_and_entities_without_threshold_have_no_part():
    found = one([0.1, 0.9], [0.1, 0.9], seen=[1, 0])
    assert (found.n.item(), found.events.item(), found.alarms.sum(), found.timed.item()) == (0, 0, 0, 0)
    unknown = one([0.1, 0.9], [0.1, 0.9], limit=np.nan)
    assert (unknown.n.item(), unknown.events.item(), unknown.alarms.sum()) == (0, 0, 0)


def test_the_time_of_the_peak_is_compared_where_there_is_one():
    found = one([0, 0, 1, 0], [1, 0, 0, 0]) + one([0, 1, 0, 0], [0, 0, 1, 0])
    assert peaks.time_to_peak(found).item() == 1.5
    level = one([0.5] * 4, [0, 0, 1, 0]) + one([0, np.nan, 1, 0], [1, 0, 0, 0])
    assert level.timed.item() == 0 and np.isnan(peaks.time_to_peak(level).item())


@pytest.fixture
def windows():
    """The arguments of `Peaks.of` for B windows; a tenth is missing."""
    random = np.random.default_rng(0)
    y = random.gamma(2.0, size=(B, H, N, F))
    mean = y + random.normal(size=y.shape)
    quantiles = np.stack([mean, mean + 1], -1)
    return y, random.random(y.shape) > 0.1, mean, mean + 0.1, quantiles


@pytest.mark.parametrize("kind", ["one by one", "three workers", "shuffled"])
def test_the_figures_do_not_depend_on_how_the_windows_were_split(windows, kind):
    limit = np.full((N, F), 2.0)
    order = np.arange(B)
    if kind == "one by one":
        parts = np.split(order, B)
    elif kind == "three workers":
        parts = [order[rank::3] for rank in range(3)]
    else:
        parts = np.array_split(np.random.default_rng(1).permutation(B), 4)
    added = Peaks.zeros(F, LEVELS)
    for part in parts:
        added = added + Peaks.of(*(array[part] for array in windows), LEVELS, limit)
    whole = Peaks.of(*windows, LEVELS, limit)
    assert whole.n.min() > 20 and whole.timed.min() > 0
    for name, array in whole.arrays().items():
        np.testing.assert_allclose(added.arrays()[name], array, rtol=1e-12, err_msg=name)


def test_wrong_shapes_and_levels_are_refused(windows):
    with pytest.raises(InputError, match="limit"):
        Peaks.of(*windows, LEVELS, np.ones((N + 1, F)))
    with pytest.raises(InputError, match="peaks of"):
        Peaks.zeros(F, LEVELS) + Peaks.zeros(F, LEVELS[:1])


def test_the_threshold_is_the_observed_value_that_a_twentieth_of_the_observed_steps_passes():
    values = np.arange(1, 101, dtype=np.float32)[:, None, None] * [[1.0, 10.0]]
    values = np.concatenate([values, np.full((50, 1, 2), np.nan)])
    values = np.random.default_rng(0).permutation(values)
    np.testing.assert_array_equal(peaks.thresholds([values[:30], values[30:]]), [[96, 960]])
    assert (values[:, 0, 0] > 96).sum() == 4, "at most a twentieth"
    values[:, 0, 1] = np.nan
    assert np.isnan(peaks.thresholds([values])[0, 1])
    assert np.isnan(peaks.thresholds([values[:0]])).all()


def test_errors_by_time_of_day_are_pooled_by_the_time_of_the_target():
    """Steps of six hours from 06:00: the targets of origin 0 lie at 06, 12 and 18, the next at 12, 18, 0."""
    sums = np.zeros((2, 5, 3, 1))
    sums[:, COUNT, :, 0] = [[1, 1, 1], [3, 0, 1]]
    sums[:, ABSOLUTE, :, 0] = [[1, 2, 3], [6, 0, 5]]
    by_origin = {1: sums[1], 0: sums[0]}
    found = peaks.by_time_of_day(by_origin, start=6 * 3600, step=6 * 3600, buckets=4)
    np.testing.assert_allclose(found[:, 0], [5, 1, (2 + 6) / 4, 3])
    hourly = peaks.by_time_of_day(by_origin, start=6 * 3600, step=6 * 3600)
    assert np.flatnonzero(np.isfinite(hourly[:, 0])).tolist() == [0, 6, 12, 18]
