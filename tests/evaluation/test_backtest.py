"""The rolling-origin test: every window counts once, however the windows are dealt out, in original units."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from fleetcast.evaluation import backtest, peaks
from fleetcast.evaluation.backtest import Measured
from fleetcast.evaluation.metrics import ABSOLUTE, COUNT, ERROR, coverage, mae
from fleetcast.evaluation.naive import DAILY_MAXIMUM, LAST_VALUE, YESTERDAY
from fleetcast.models.base import Output
from fleetcast.schemas import QUANTILES
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.loader import Shards

STEPS, HISTORY, HORIZON, DAY = 300, 8, 4, 96
NO_SHIFT = np.zeros((HORIZON, 2, len(QUANTILES)))
GROUPS = [["e0", "e1"], ["e2"]]


def skewed(batch: Batch) -> Output:
    """A model's stand-in: element by element, biased, its quantiles far too narrow."""
    mean = 0.5 * batch.seasonal[..., 0] + 0.3
    levels = 0.01 * np.array(QUANTILES, dtype=np.float32)
    return Output(mean, mean[..., None] + batch.y.new_tensor(levels))


def one_level(batch: Batch) -> Output:
    """As `skewed`, with its highest level only."""
    output = skewed(batch)
    return Output(output.mean, output.quantiles[..., -1:])


@pytest.fixture
def values() -> np.ndarray:
    """[T, N, F] two metrics of very different size; a tenth is missing, and once a whole look-back."""
    random = np.random.default_rng(3)
    values = random.normal(size=(STEPS, 3, 2)) * [0.1, 20] + [0.5, 100]
    values[random.random(values.shape) < 0.1] = np.nan
    values[250 : 250 + HISTORY + 2, 1, 0] = np.nan
    return values.astype(np.float32)


@pytest.fixture
def made(dataset, values):
    """A dataset of two groups and several shards, and its store."""
    return dataset(values, groups=GROUPS, width=120, history=HISTORY, horizon=HORIZON, lags=(DAY,))


@pytest.fixture
def ladder(made):
    return {"skewed": skewed, **backtest.rungs(made[1], None, "")}


def measure(made, ladder, items, shifts=None) -> dict[str, Measured]:
    store, data = made
    batches = Shards(store, data).batches(items)
    return backtest.measure(batches, ladder, data.scaler, QUANTILES, HORIZON, shifts, limits(made))


def limits(made) -> np.ndarray:
    """[N, F] thresholds of high load, low enough that there is some of every entity."""
    return np.tile(np.float32(made[1].scaler.mean), (made[1].entities, 1))


# -- the naive rungs, computed a second time ---------------------------------------------------------------


def naive(values: np.ndarray, origin: int, rung: str, unknown: list[float]) -> np.ndarray:
    """[H, N, F] the naive forecast of one window from the telemetry itself; `unknown` if it has none."""
    guess = np.empty((HORIZON, *values.shape[1:]))
    for n, f in np.ndindex(*values.shape[1:]):
        past = values[origin - HISTORY : origin, n, f]
        seen = past[np.isfinite(past)]
        guess[:, n, f] = seen[-1] if len(seen) else unknown[f]
        earlier = values[origin - DAY : origin - DAY + HORIZON, n, f]
        there = np.isfinite(earlier)
        if rung == YESTERDAY:
            guess[there, n, f] = earlier[there]
        if rung == DAILY_MAXIMUM and there.any():
            guess[:, n, f] = earlier[there].max()
    return guess


@pytest.mark.parametrize("rung", [LAST_VALUE, YESTERDAY, DAILY_MAXIMUM])
def test_the_errors_of_the_naive_rungs_are_those_of_the_raw_telemetry(made, ladder, values, rung):
    _, data = made
    found = measure(made, ladder, order.evaluation(data, "test", 16))[rung]
    origins = range(data.boundaries[1], STEPS - HORIZON + 1)
    assert len(origins) == data.windows("test") == 57
    errors = np.stack(
        [values[o : o + HORIZON] - naive(values, o, rung, list(data.scaler.mean)) for o in origins]
    )
    np.testing.assert_allclose(
        mae(found.scores), np.nanmean(np.abs(errors), axis=(0, 2)), rtol=1e-6, err_msg="per horizon step"
    )
    expected = np.nanmean(np.abs(errors), axis=(0, 1, 2))
    np.testing.assert_allclose(mae(found.scores.pooled())[0], expected, rtol=1e-6)

    assert sorted(found.by_origin) == list(origins)
    for origin, of_window in zip(origins, errors, strict=True):
        total, count = found.by_origin[origin][[ERROR, COUNT]]
        np.testing.assert_allclose(total, np.nansum(of_window, axis=1), rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(count, np.isfinite(of_window).sum(1))


# -- parts add up ------------------------------------------------------------------------------------------


def same(one: Measured, other: Measured) -> None:
    """Counts are equal, sums but for the rounding of their order."""
    states = {field.name for field in fields(Measured)}
    assert states == {"scores", "residuals", "by_origin", "peaks", "entities"}, "each is compared below"
    ours, theirs = one.scores.to_json(), other.scores.to_json()
    for name in ours:
        exact = name in ("levels", "floor", "n", "centre", "ape_n", "below", "inside")
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0 if exact else 1e-12, err_msg=name)
    assert (one.residuals is None) == (other.residuals is None)
    if one.residuals is not None and other.residuals is not None:
        np.testing.assert_array_equal(one.residuals.counts, other.residuals.counts)
        np.testing.assert_array_equal(one.residuals.largest, other.residuals.largest)
    for name, array in one.peaks.arrays().items():
        np.testing.assert_allclose(array, other.peaks.arrays()[name], rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(one.entities.n, other.entities.n)
    np.testing.assert_allclose(one.entities.scaled_error, other.entities.scaled_error, rtol=1e-12)
    assert one.by_origin.keys() == other.by_origin.keys()
    for origin, error in one.by_origin.items():
        np.testing.assert_allclose(error, other.by_origin[origin], atol=1e-9)


@pytest.mark.parametrize("calibrated", [False, True])
def test_any_partition_of_the_windows_in_any_order_gives_the_same(made, ladder, calibrated):
    _, data = made
    shifts = None
    if calibrated:
        of_val = measure(made, ladder, order.evaluation(data, "val", 16))
        shifts = {name: found.residuals.shifts() for name, found in of_val.items()}
    whole = measure(made, ladder, order.evaluation(data, "test", 64), shifts)

    random = np.random.default_rng(0)
    pieces = order.evaluation(data, "test", 5)
    pieces = [(shard, random.permutation(origins)) for shard, origins in pieces]
    pieces = [pieces[i] for i in random.permutation(len(pieces))]
    parts = [measure(made, ladder, pieces[i : i + 3], shifts) for i in range(0, len(pieces), 3)]
    for name, found in whole.items():
        added = parts[0][name]
        for part in parts[1:]:
            added = added + part[name]
        same(added, found)


def test_all_rungs_count_the_same_targets_and_every_observed_one_once(made, ladder, values):
    _, data = made
    measured = measure(made, ladder, order.evaluation(data, "test", 16))
    first = data.boundaries[1]
    windows = data.windows("test")
    for found in measured.values():
        for h in range(HORIZON):
            seen = np.isfinite(values[first + h : first + h + windows])
            np.testing.assert_array_equal(found.scores.n[h], seen.sum((0, 1)))


@pytest.mark.parametrize("part", ["val", "test"])
def test_what_was_saved_is_loaded_exactly(made, ladder, part):
    _, data = made
    items = order.evaluation(data, "val", 16)
    measured = measure(made, ladder, items)
    if part == "test":
        shifts = {name: found.residuals.shifts() for name, found in measured.items()}
        measured = measure(made, ladder, items, shifts)
    file = io.BytesIO()
    backtest.save(measured, file)
    file.seek(0)
    loaded = backtest.load(file, QUANTILES, HORIZON)
    assert list(loaded) == list(measured)
    for name, found in measured.items():
        again = loaded[name]
        assert again.scores.to_json() == found.scores.to_json()
        assert list(again.by_origin) == list(found.by_origin)
        for origin, error in found.by_origin.items():
            np.testing.assert_array_equal(again.by_origin[origin], error)
        for key, array in found.peaks.arrays().items():
            np.testing.assert_array_equal(again.peaks.arrays()[key], array)
        np.testing.assert_array_equal(again.entities.n, found.entities.n)
        np.testing.assert_array_equal(again.entities.scaled_error, found.entities.scaled_error)
        if part == "test":
            assert again.residuals is None
        else:
            assert (again.residuals.levels, again.residuals.horizon) == (QUANTILES, HORIZON)
            np.testing.assert_array_equal(again.residuals.counts, found.residuals.counts)
            np.testing.assert_array_equal(again.residuals.largest, found.residuals.largest)


def test_files_of_earlier_versions_have_no_entities_and_leave_a_total_without(made, ladder):
    _, data = made
    now = measure(made, ladder, order.evaluation(data, "test", 64))
    file = io.BytesIO()
    backtest.save({name: replace(found, entities=None) for name, found in now.items()}, file)
    file.seek(0)
    for name, before in backtest.load(file, QUANTILES, HORIZON).items():
        assert before.entities is None
        assert (before + now[name]).entities is None and (now[name] + before).entities is None
        assert before.scores.to_json() == now[name].scores.to_json()


# -- what counts, and in which units -----------------------------------------------------------------------


def test_targets_that_were_not_observed_do_not_count(made, ladder):
    store, data = made
    batches = list(Shards(store, data).batches(order.evaluation(data, "val", 16)))
    assert any(not batch.y_mask.all() for batch in batches)
    other = [replace(b, y=torch.where(b.y_mask, b.y, 1e6 + torch.arange(4)[:, None, None])) for b in batches]
    for name in ladder:
        one, two = (
            backtest.measure(
                given, {name: ladder[name]}, data.scaler, QUANTILES, HORIZON, None, limits(made)
            )[name]
            for given in (batches, other)
        )
        assert one.scores.to_json() == two.scores.to_json()
        same(one, two)


def test_a_forecast_is_in_original_units_and_a_point_moves_by_the_shifts_of_its_rung(made, ladder):
    store, data = made
    (batch,) = Shards(store, data).batches([(0, np.array([50, 60]))])
    point = ladder[YESTERDAY]
    scaled = point(batch).mean.double().numpy()
    mean, std = np.asarray(data.scaler.mean), np.asarray(data.scaler.std)

    plain = backtest.forecast(point, batch, data.scaler, QUANTILES, None)
    np.testing.assert_allclose(plain.mean, scaled * std + mean)
    np.testing.assert_array_equal(plain.quantiles, np.repeat(plain.mean[..., None], len(QUANTILES), -1))

    shifts = np.sort(np.random.default_rng(0).normal(size=(HORIZON, 2, len(QUANTILES))))
    moved = backtest.forecast(point, batch, data.scaler, QUANTILES, shifts)
    expected = (scaled[..., None] + shifts[:, None]) * std[:, None] + mean[:, None]
    np.testing.assert_allclose(moved.quantiles, expected)
    np.testing.assert_array_equal(moved.mean, plain.mean)
    np.testing.assert_array_equal(moved.median, plain.mean)


def test_the_median_of_a_rung_with_quantiles_is_its_calibrated_half(made, ladder):
    store, data = made
    (batch,) = Shards(store, data).batches([(0, np.array([50, 60]))])
    shifts = np.sort(np.random.default_rng(0).normal(size=(HORIZON, 2, len(QUANTILES))))
    given = backtest.forecast(ladder["skewed"], batch, data.scaler, QUANTILES, shifts)
    np.testing.assert_array_equal(given.median, given.quantiles[..., QUANTILES.index(0.5)])
    assert not np.allclose(given.median, given.mean)
    without = backtest.forecast(one_level, batch, data.scaler, QUANTILES[-1:], None)
    np.testing.assert_array_equal(without.median, without.mean)


def test_scores_and_sums_per_origin_and_entity_count_the_errors_of_the_median(made, ladder):
    _, data = made
    found = measure(made, {"skewed": skewed}, order.evaluation(data, "val", 16))["skewed"]
    batches = list(Shards(*made).batches(order.evaluation(data, "val", 64)))
    spread, centre = np.asarray(data.scaler.std), np.asarray(data.scaler.mean)
    expected = 0.0
    for batch in batches:
        median = backtest.forecast(skewed, batch, data.scaler, QUANTILES, None).median
        miss = np.abs(batch.y.double().numpy() * spread + centre - median)
        expected = expected + np.where(batch.y_mask, miss, 0).sum((0, 2))
    np.testing.assert_allclose(found.scores.abs_error, expected)
    np.testing.assert_allclose(found.scores.scaled_error, expected / spread)
    np.testing.assert_allclose(sum(found.by_origin.values())[ABSOLUTE], expected / spread)
    np.testing.assert_allclose(found.entities.scaled_error.sum(0), (expected / spread).sum(0))


def test_intervals_calibrated_on_exchangeable_data_cover_what_they_promise(dataset):
    random = np.random.default_rng(1)
    values = random.gamma(2.0, size=(1200, 4, 1)).astype(np.float32)
    made = dataset(values, metrics=("cpu",), history=4, horizon=2, lags=(DAY,), split=(0.2, 0.4, 0.4))
    _, data = made
    ladder = {"skewed": skewed, **backtest.rungs(data, None, "")}

    def measured(part, shifts=None):
        batches = Shards(made[0], data).batches(order.evaluation(data, part, 64))
        return backtest.measure(batches, ladder, data.scaler, QUANTILES, 2, shifts)

    raw = measured("val")
    shifts = {name: found.residuals.shifts() for name, found in raw.items()}
    for name, found in measured("test", shifts).items():
        for nominal in (0.5, 0.8, 0.9):
            assert coverage(found.scores.pooled(), nominal)[0, 0] == pytest.approx(nominal, abs=0.03), name
    assert coverage(raw["skewed"].scores.pooled(), 0.9)[0, 0] < 0.1, "before it was calibrated"


@pytest.mark.parametrize("scale", ["metric", "entity"])
def test_the_errors_of_each_entity_are_those_of_the_raw_telemetry_in_its_own_scale(dataset, values, scale):
    values = values * np.float32([[[1], [5], [20]]])
    store, data = dataset(
        values, groups=GROUPS, width=120, history=HISTORY, horizon=HORIZON, lags=(DAY,), scale=scale
    )
    naive_rung = {LAST_VALUE: backtest.rungs(data, None, "")[LAST_VALUE]}
    batches = list(Shards(store, data).batches(order.evaluation(data, "test", 16)))
    found = backtest.measure(batches, naive_rung, data.scaler, QUANTILES, HORIZON, None)[LAST_VALUE].entities
    std = np.asarray(data.scaler.entity_std if scale == "entity" else [data.scaler.std] * 3)
    mean = np.asarray(data.scaler.entity_mean if scale == "entity" else [data.scaler.mean] * 3)
    for n, f in np.ndindex(3, 2):
        of_one = values[:, [n], :]
        errors = [
            np.abs(of_one[o : o + HORIZON, 0, f] - naive(of_one, o, LAST_VALUE, list(mean[n]))[:, 0, f])
            for o in range(data.boundaries[1], STEPS - HORIZON + 1)
        ]
        assert found.scaled_mae()[n, f] == pytest.approx(np.nanmean(errors) / std[n, f], rel=1e-5)

    strangers = [replace(batch, nodes=torch.full_like(batch.nodes, -1)) for batch in batches]
    unknown = backtest.measure(strangers, naive_rung, data.scaler, QUANTILES, HORIZON, None)[LAST_VALUE]
    assert not unknown.entities.n.any() and unknown.scores.n.sum() > 0


# -- peaks -------------------------------------------------------------------------------------------------


def test_each_entity_has_its_own_threshold_in_whatever_group_it_is(made, ladder, values):
    store, data = made
    batches = list(Shards(store, data).batches(order.evaluation(data, "test", 16)))
    limit = peaks.thresholds([values[: data.boundaries[0]]])
    naive = {LAST_VALUE: ladder[LAST_VALUE]}
    found = backtest.measure(batches, naive, data.scaler, QUANTILES, HORIZON, {LAST_VALUE: NO_SHIFT}, limit)
    targets = [values[o : o + HORIZON] for o in range(data.boundaries[1], STEPS - HORIZON + 1)]
    np.testing.assert_array_equal(found[LAST_VALUE].peaks.n, (np.stack(targets) > limit).sum((0, 1, 2)))


def test_a_load_that_reaches_its_threshold_and_never_passes_it_is_not_high(dataset):
    values = np.full((STEPS, 3, 2), [0.1, 23.7], np.float32)
    values[:, 2] = np.random.default_rng(0).normal(size=(STEPS, 2))
    store, data = dataset(values, width=120, history=HISTORY, horizon=HORIZON, lags=(DAY,))
    limit = peaks.thresholds([values[: data.boundaries[0]]])
    limit[2] = np.inf
    batches = Shards(store, data).batches(order.evaluation(data, "test", 16))
    ladder = {LAST_VALUE: backtest.rungs(data, None, "")[LAST_VALUE]}
    found = backtest.measure(batches, ladder, data.scaler, QUANTILES, HORIZON, None, limit)[LAST_VALUE].peaks
    assert found.n.tolist() == [0, 0] and found.alarms.sum() == 0 and found.timed.sum() > 0


def test_without_thresholds_no_peaks_are_counted(made, ladder):
    store, data = made
    batches = Shards(store, data).batches(order.evaluation(data, "val", 16))
    found = backtest.measure(batches, ladder, data.scaler, QUANTILES, HORIZON, None)
    assert all(one.peaks is None and (one + one).peaks is None for one in found.values())


# -- the cluster's total -----------------------------------------------------------------------------------


def test_the_totals_interval_is_around_it_and_as_wide_as_its_own_errors_were_large():
    """Errors of one sign only, as of a validation part of a few days, do not move it off the forecast."""
    errors = np.arange(1, 21)[:, None, None] * np.array([[1.0], [10.0]])  # [origins, H, F]
    by_origin = {o: np.stack([errors[o] * 4, np.full((2, 1), 4.0)]) for o in range(20)}
    shifts = backtest.total_shifts(by_origin, (0.1, 0.5, 0.95), entities=4)
    np.testing.assert_allclose(shifts[:, 0], [[-17, 0, 19], [-170, 0, 190]], atol=1e-9)


def test_steps_at_which_fewer_than_half_of_the_entities_were_observed_do_not_count():
    well = {o: np.stack([np.full((2, 1), 2.0 * (o + 1)), np.full((2, 1), 2.0)]) for o in range(9)}
    poor = {9: np.stack([np.full((2, 1), 1e6), np.full((2, 1), 1.0)])}
    levels = (0.1, 0.5, 0.99)
    np.testing.assert_array_equal(
        backtest.total_shifts(well | poor, levels, 4), backtest.total_shifts(well, levels, 4)
    )
    assert backtest.total_shifts(well | poor, levels, 2).max() == 1e6, "one of two is half"
    np.testing.assert_array_equal(backtest.total_shifts(poor, levels, 4), np.zeros((2, 1, 3)))
