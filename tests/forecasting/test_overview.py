"""The cluster's total and its highest peaks, put together from groups that know nothing of each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fleetcast.forecasting import overview
from fleetcast.forecasting.predict import GroupForecast
from fleetcast.schemas import QUANTILES, quantile_name

ENTITIES, HORIZON, METRICS = 13, 4, ("cpu", "request_rate")
Q95 = QUANTILES.index(0.95)


def whole(random: np.random.Generator, **changes) -> GroupForecast:
    """All entities in one group; eighths, so that sums are exact in any order."""
    mean = random.integers(0, 80, size=(HORIZON, ENTITIES, 2)) / 8
    history = random.integers(0, 80, size=(3 * HORIZON, ENTITIES, 2)) / 8
    spread = np.sort(random.integers(0, 16, size=(*mean.shape, len(QUANTILES))) / 8)
    found = {
        "entities": tuple(f"e{n:02d}" for n in range(ENTITIES)),
        "mean": mean,
        "quantiles": mean[..., None] + spread,
        "fallback": [None] * ENTITIES,
        "cold": [None] * ENTITIES,
        "history": history,
        "gone": np.zeros((3 * HORIZON, 0, 2)),
    }
    return GroupForecast(**(found | changes))


def cut(found: GroupForecast, members: list[int], history: int = 3 * HORIZON) -> GroupForecast:
    """Some entities of a forecast as a group of their own, with the last `history` steps."""
    return GroupForecast(
        tuple(found.entities[n] for n in members),
        found.mean[:, members],
        found.quantiles[:, members],
        [found.fallback[n] for n in members],
        [found.cold[n] for n in members],
        found.history[-history:, members],
        found.gone[-history:, :0],
    )


@pytest.fixture
def random():
    return np.random.default_rng(2)


@pytest.fixture
def data(plan):
    names = [f"e{n:02d}" for n in range(ENTITIES)]
    return plan(60, groups=[names], horizon=HORIZON, metrics=METRICS)


@pytest.fixture
def shifts(random):
    """[K, F, Q], a bucket for each of the four steps."""
    return np.sort(random.normal(size=(HORIZON, 2, len(QUANTILES))))


def of(groups: list[GroupForecast], data, shifts) -> dict:
    return overview.of_cluster([overview.of_group(group, data) for group in groups], data, shifts)


def test_the_total_is_the_sum_of_the_means_and_its_interval_that_of_its_own_errors(random, data, shifts):
    found = whole(random)
    shown = of([found], data, shifts)["total"]
    assert list(shown) == list(METRICS)
    for f, metric in enumerate(METRICS):
        forecast, total = shown[metric]["forecast"], found.mean[:, :, f].sum(1)
        assert forecast["mean"] == total.tolist()
        for q, level in enumerate(QUANTILES):
            expected = np.maximum(total + ENTITIES * shifts[:, f, q], 0)
            np.testing.assert_allclose(forecast[quantile_name(level)], expected)


def test_the_interval_of_the_total_is_never_negative(random, data, shifts):
    shown = of([whole(random)], data, shifts - 100)["total"]["cpu"]["forecast"]
    assert shown["q05"] == shown["q99"] == [0] * HORIZON


def test_the_past_total_stands_for_all_entities_and_is_null_where_fewer_than_half_were_observed(
    random, data, shifts
):
    history = np.full((3 * HORIZON, ENTITIES, 2), 2.0)
    history[0, :, 0] = np.nan
    history[1, :7, 0] = np.nan  # 6 of 13
    history[2, :6, 0] = np.nan  # 7 of 13
    total = of([whole(random, history=history)], data, shifts)["total"]
    assert total["cpu"]["history"] == [None, None] + [26.0] * 10
    assert total["request_rate"]["history"] == [26.0] * 12


def test_who_is_gone_counts_in_the_past_until_it_was_last_observed_and_never_in_the_forecast(
    random, data, shifts
):
    gone = np.full((3 * HORIZON, 2, 2), 5.0)
    gone[4:, 0] = np.nan
    gone[[0, 6, 8, 9, 10, 11], 1] = np.nan  # one of these is a gap
    history = np.full((3 * HORIZON, ENTITIES, 2), 2.0)
    found = whole(random, history=history, gone=gone)
    shown = of([found], data, shifts)["total"]["cpu"]
    there = np.array([2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]) + ENTITIES
    observed = np.isfinite(gone[:, :, 0]).sum(1)
    expected = (26 + 5 * observed) / (ENTITIES + observed) * there
    np.testing.assert_allclose(shown["history"], expected)
    assert shown["forecast"]["mean"] == found.mean[:, :, 0].sum(1).tolist()


def test_groups_together_show_what_one_group_shows(random, data, shifts):
    found = whole(random)
    found.history[random.random(found.history.shape) < 0.3] = np.nan
    members = random.permutation(ENTITIES)
    groups = [cut(found, part.tolist()) for part in np.array_split(members, 4)]
    assert of(groups, data, shifts) == of([found], data, shifts)
    shares = [overview.of_group(group, data) for group in groups]
    pairs = [overview.together(*shares[:2]), overview.together(*shares[2:])]
    assert overview.of_cluster(pairs, data, shifts) == of([found], data, shifts)


def test_the_total_goes_as_far_back_as_all_groups_do(random, data, shifts):
    found = whole(random)
    ragged = [cut(found, list(range(5))), cut(found, list(range(5, ENTITIES)), history=7)]
    shown, expected = of(ragged, data, shifts), of([found], data, shifts)
    assert shown["total"]["cpu"]["history"] == expected["total"]["cpu"]["history"][-7:]
    assert shown["total"]["cpu"]["forecast"] == expected["total"]["cpu"]["forecast"]


def test_the_highest_peaks_of_each_metric_come_first_and_equal_ones_by_name(random, data, shifts):
    found = whole(random)
    found.quantiles[:, 4] = found.quantiles[:, 9]
    groups = [cut(found, [9, 1, 3, 5, 7, 11]), cut(found, [12, 10, 8, 6, 4, 2, 0])]
    peaks = of(groups, data, shifts)["peaks"]
    for f, metric in enumerate(METRICS):
        top = found.quantiles[:, :, f, Q95].max(0)
        expected = sorted(found.entities, key=lambda name: (-top[int(name[1:])], name))
        shown = [peak for peak in peaks if peak["metric"] == metric]
        assert [peak["entity"] for peak in shown] == expected[: overview.PEAKS]
        assert expected.index("e09") == expected.index("e04") + 1
        for peak in shown:
            n = int(peak["entity"][1:])
            assert peak["q95"] == top[n] == found.quantiles[peak["step"], n, f, Q95]
            assert peak["mean"] == found.mean[peak["step"], n, f]
            assert peak["forecast"]["mean"] == found.mean[:, n, f].tolist()
            assert peak["forecast"]["q05"] == found.quantiles[:, n, f, 0].tolist()
            assert peak["history"] == found.history[:, n, f].tolist()


def test_an_overview_is_plain_json_with_null_in_gaps(random, data, shifts):
    found = whole(random)
    found.history[3] = np.nan
    part = overview.of_group(found, data)
    sent = json.loads(json.dumps(part, allow_nan=False))
    shown = overview.of_cluster([sent], data, shifts)
    assert shown == of([found], data, shifts)
    json.dumps(shown, allow_nan=False)
    assert shown["peaks"][0]["history"][3] is None
