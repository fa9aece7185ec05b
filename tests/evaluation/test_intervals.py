"""Calibrated quantiles cover what they promise on exchangeable data, however wrong the model's were."""

import io

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.intervals import MAX_BUCKETS, ResidualHistogram, bucket_of, calibrate
from fleetcast.schemas import QUANTILES

Q = len(QUANTILES)


def draw(seed, windows, horizon=30, entities=10, metrics=2):
    """(y, mask): load that spreads more further ahead, the second metric skewed; a tenth is missing."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0.5, 2, horizon)[:, None]
    y = np.stack(
        [rng.normal(0, 1, (windows, horizon, entities)), rng.gamma(2, 1, (windows, horizon, entities))], -1
    )
    return (y * spread[..., None])[..., :metrics], rng.random((windows, horizon, entities, metrics)) > 0.1


def fit(y, mask, predicted, levels=QUANTILES):
    histogram = ResidualHistogram.zeros(y.shape[1], y.shape[3], levels)
    histogram.add(y, mask, predicted)
    return histogram


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(np.zeros(Q), id="a point forecast"),
        pytest.param(np.linspace(3, 5, Q), id="far too high"),
        pytest.param(np.linspace(4, -4, Q), id="upside down"),
    ],
)
def test_coverage_is_nominal_at_every_level(wrong):
    y, mask = draw(0, 300)
    shifts = fit(y, mask, np.broadcast_to(wrong, (*y.shape, Q))).shifts()
    later, seen = draw(1, 300)
    quantiles = calibrate(np.broadcast_to(wrong, (*later.shape, Q)), shifts)
    for metric in range(2):
        below = (later[..., metric, None] <= quantiles[..., metric, :])[seen[..., metric]].mean(axis=0)
        np.testing.assert_allclose(below, QUANTILES, atol=0.01)
    near, far = (quantiles[0, step, 0, 0, -1] - quantiles[0, step, 0, 0, 0] for step in (0, -1))
    assert far > 2.5 * near, "each part of the horizon has its own spread"


def test_a_point_forecast_stands_for_every_level():
    y, mask = draw(2, 20)
    point = np.full(y.shape, 0.7)
    every_level = np.repeat(point[..., None], Q, axis=-1)
    np.testing.assert_array_equal(fit(y, mask, point).shifts(), fit(y, mask, every_level).shifts())


def test_merging_equals_one_pass_exactly():
    y, mask = draw(3, 60)
    rng = np.random.default_rng(4)
    predicted = rng.normal(0, 1, (*y.shape, Q)).astype(np.float32)
    whole = fit(y, mask, predicted)
    parts = [fit(y[pick], mask[pick], predicted[pick]) for pick in np.array_split(rng.permutation(60), 7)]
    merged = sum(parts[1:], parts[0])
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_array_equal(merged.largest, whole.largest)
    assert whole.counts.sum() == mask.sum() * Q


def test_calibrated_quantiles_rise():
    y, mask = draw(5, 3)
    predicted = np.random.default_rng(6).normal(0, 3, (*y.shape, Q)).astype(np.float32)
    quantiles = calibrate(predicted, fit(y, mask, predicted).shifts())
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    assert quantiles.dtype == np.float32


def residuals(values):
    """One step, one metric, forecast zero."""
    y = np.array(values, dtype=float).reshape(-1, 1, 1, 1)
    return fit(y, np.ones(y.shape, bool), np.zeros(y.shape))


def test_the_shift_is_the_finite_sample_quantile():
    # 19 residuals: (19 + 1) · 0.95 = 19, the largest; (19 + 1) · 0.05 = 1, the smallest.
    histogram = residuals(np.arange(1, 20) / 10)
    assert histogram.shift(0.95).item() == 1.9
    for level, exact in ((0.05, 0.1), (0.5, 1.0), (0.9, 1.8)):
        assert exact <= histogram.shift(level).item() <= exact * 1.004 + 0.0005


def test_the_rank_counts_the_target_to_come():
    # (10 + 1) · 0.5 = 5.5, hence the sixth of ten, and (10 + 1) · 0.9 = 9.9, hence the tenth.
    histogram = residuals(np.arange(1, 11) / 10)
    assert 0.6 <= histogram.shift(0.5).item() < 0.61
    assert histogram.shift(0.9).item() == 1.0


def test_too_few_residuals_give_the_extreme_one_and_none_give_no_shift():
    assert residuals([-0.3, 0.4, 0.2]).shift(0.99).item() == 0.4
    assert residuals([-0.3]).shift(0.05).item() == -0.3
    assert (ResidualHistogram.zeros(5, 1, QUANTILES).shifts() == 0).all()


def test_residuals_beyond_the_grid_still_count():
    assert residuals([1e6, 2e6]).shift(0.99).item() == 2e6
    assert residuals([-1e6, -2e6]).shift(0.05).item() >= -2e6


def test_missing_targets_do_not_count():
    y, mask = draw(7, 10)
    y[~mask] = np.nan
    assert fit(y, mask, np.zeros(y.shape)).counts.sum() == mask.sum() * Q
    assert not fit(y, np.zeros_like(mask), np.zeros(y.shape)).counts.any()


def test_buckets_share_a_long_horizon_and_split_a_short_one():
    assert bucket_of(np.arange(3), 3).tolist() == [0, 1, 2]
    sizes = np.bincount(bucket_of(np.arange(289), 289))
    assert len(sizes) == MAX_BUCKETS and sizes.max() - sizes.min() <= 1


def test_a_saved_histogram_is_the_same():
    y, mask = draw(8, 5)
    histogram, file = fit(y, mask, np.zeros(y.shape)), io.BytesIO()
    histogram.save(file)
    file.seek(0)
    again = ResidualHistogram.load(file)
    np.testing.assert_array_equal((again + histogram).counts, 2 * histogram.counts)
    np.testing.assert_array_equal(again.shifts(), histogram.shifts())


def test_what_does_not_fit_is_refused():
    y, mask = draw(9, 2)
    with pytest.raises(InputError, match="predicted"):
        fit(y, mask, np.zeros((*y.shape, 3)))
    with pytest.raises(InputError, match="not a finite number"):
        fit(y, mask, np.full(y.shape, np.nan))
    with pytest.raises(InputError, match="expected"):
        residuals([1.0]) + ResidualHistogram.zeros(1, 1, (0.5,))
    with pytest.raises(InputError, match="shifts"):
        calibrate(np.zeros((1, 5, 1, 1, Q)), np.zeros((4, 1, Q)))
