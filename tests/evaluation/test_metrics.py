"""Scores are sums and counts: the same figures however the windows were split, ordered or spread."""

import json

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation import metrics as m
from fleetcast.evaluation.metrics import PerEntity, Scores
from fleetcast.schemas import QUANTILES

B, H, N, F = 37, 6, 5, 2
FLOOR = (0.1, 0.1)
STD, SCALE = np.array([0.2, 3.0]), np.array([0.1, 2.0])


@pytest.fixture
def windows():
    """(y, mask, mean, quantiles) of B windows: a tenth is missing, some targets are zero."""
    rng = np.random.default_rng(0)
    y = rng.gamma(2.0, 0.3, (B, H, N, F)).astype(np.float32)
    y[rng.random(y.shape) < 0.05] = 0
    mask = rng.random(y.shape) > 0.1
    mean = (y + rng.normal(0, 0.2, y.shape)).astype(np.float32)
    quantiles = np.sort(mean[..., None] + rng.normal(0, 0.3, (*y.shape, len(QUANTILES))), axis=-1)
    return y, mask, mean, quantiles


def score(windows, pick=slice(None)):
    return Scores.of(*(array[pick] for array in windows), QUANTILES, FLOOR, scale=STD)


def every_figure(scores):
    figures = {f.__name__: f(scores) for f in (m.mae, m.mse, m.rmse, m.mape, m.mape_share, m.wape, m.r2)}
    by_level = (m.pinball, m.calibration, m.wis, m.idle, m.shortfall, m.under_provisioned)
    figures |= {"mase": m.mase(scores, SCALE), "scaled_mae": m.scaled_mae(scores)}
    figures |= {f"coverage {c}": m.coverage(scores, c) for c in m.INTERVALS}
    return figures | {f.__name__: f(scores) for f in by_level}


def split(kind, windows):
    """The windows' scores, added up in another way than in one batch."""
    order = np.arange(B)
    if kind == "one by one":
        parts = np.split(order, B)
    elif kind == "three workers":
        parts = [order[rank::3] for rank in range(3)]
    else:
        parts = np.array_split(np.random.default_rng(1).permutation(B), 4)
    return sum((score(windows, part) for part in parts), Scores.zeros(H, QUANTILES, FLOOR))


@pytest.mark.parametrize("kind", ["one by one", "three workers", "uneven and shuffled"])
@pytest.mark.parametrize("pool", [False, True])
def test_figures_do_not_depend_on_how_the_windows_were_split(windows, kind, pool):
    whole, parts = score(windows), split(kind, windows)
    if pool:
        whole, parts = whole.pooled(), parts.pooled()
    for name, expected in every_figure(whole).items():
        np.testing.assert_allclose(every_figure(parts)[name], expected, rtol=1e-12, err_msg=name)


def test_every_observed_target_counts_once(windows):
    assert score(windows).n.sum() == windows[1].sum()


def test_point_figures_are_those_of_the_definitions(windows):
    y, mask, mean, _ = windows
    scores = score(windows)
    seen = mask[:, 2, :, 1]
    target, forecast = (array[:, 2, :, 1][seen].astype(float) for array in (y, mean))
    error = target - forecast
    big = np.abs(target) >= FLOOR[1]
    expected = {
        "mae": np.abs(error).mean(),
        "mse": (error**2).mean(),
        "rmse": np.sqrt((error**2).mean()),
        "mape": (np.abs(error[big]) / target[big]).mean(),
        "mape_share": big.mean(),
        "wape": np.abs(error).sum() / target.sum(),
        "r2": 1 - (error**2).sum() / ((target - target.mean()) ** 2).sum(),
        "mase": np.abs(error).mean() / SCALE[1],
        "scaled_mae": np.abs(error).mean() / STD[1],
    }
    figures = every_figure(scores)
    for name, value in expected.items():
        assert figures[name][2, 1] == pytest.approx(value, rel=1e-12), name


def test_each_entity_may_have_a_scale_of_its_own(windows):
    y, mask, mean, _ = windows
    own = np.linspace(0.5, 2, N * F).reshape(N, F)
    scores = Scores.of(y, mask, mean, None, (), FLOOR, scale=own)
    expected = np.where(mask, np.abs(y.astype(float) - mean) / own, 0).sum((0, 2)) / mask.sum((0, 2))
    np.testing.assert_allclose(m.scaled_mae(scores), expected)


def test_quantile_figures_are_those_of_the_definitions(windows):
    y, mask, _, quantiles = windows
    seen = mask[:, 0, :, 0]
    target, bands = y[:, 0, :, 0][seen].astype(float), quantiles[:, 0, :, 0][seen]
    gap = target[:, None] - bands
    loss = np.where(gap >= 0, np.array(QUANTILES) * gap, (np.array(QUANTILES) - 1) * gap)
    weighted = 0.5 * np.abs(target - bands[:, 3])
    for nominal, low, high in ((0.5, 2, 4), (0.8, 1, 5), (0.9, 0, 6)):
        alpha, (lower, upper) = 1 - nominal, (bands[:, low], bands[:, high])
        inside = (target >= lower) & (target <= upper)
        missed = np.where(target < lower, lower - target, 0) + np.where(target > upper, target - upper, 0)
        weighted = weighted + alpha / 2 * (upper - lower + 2 / alpha * missed)
        assert m.coverage(score(windows), nominal)[0, 0] == inside.mean()
    assert m.pinball(score(windows))[0, 0] == pytest.approx(loss.mean())
    assert m.wis(score(windows))[0, 0] == pytest.approx((weighted / 3.5).mean())
    np.testing.assert_allclose(m.calibration(score(windows))[0, 0], (gap <= 0).mean(axis=0))
    np.testing.assert_allclose(m.under_provisioned(score(windows))[0, 0], (gap > 0).mean(axis=0))
    np.testing.assert_allclose(m.idle(score(windows))[0, 0], np.maximum(-gap, 0).mean(axis=0))
    np.testing.assert_allclose(m.shortfall(score(windows))[0, 0], np.maximum(gap, 0).mean(axis=0))


def test_absolute_errors_are_of_the_median_and_squared_ones_of_the_mean(windows):
    y, mask, mean, quantiles = windows
    median = quantiles[..., QUANTILES.index(0.5)]
    both = Scores.of(y, mask, mean, quantiles, QUANTILES, FLOOR, median)
    of_mean, of_median = (Scores.of(y, mask, point, quantiles, QUANTILES, FLOOR) for point in (mean, median))
    for name, figure in every_figure(both).items():
        squared = name in ("mse", "rmse", "r2")
        expected = every_figure(of_mean if squared else of_median)[name]
        np.testing.assert_array_equal(figure, expected, err_msg=name)
    with pytest.raises(InputError, match="median"):
        Scores.of(y, mask, mean, quantiles, QUANTILES, FLOOR, median[:1])


def test_sums_per_origin_are_those_of_the_scores(windows):
    y, mask, mean, quantiles = windows
    median = quantiles[..., QUANTILES.index(0.5)]
    broken = np.where(mask, y, np.nan)
    sums = m.per_origin(broken, mask, mean, median, quantiles, QUANTILES)
    assert sums.shape == (B, 5, H, F)
    total = Scores.of(y, mask, mean, quantiles, QUANTILES, FLOOR, median)
    np.testing.assert_array_equal(sums[:, m.COUNT].sum(0), total.n)
    np.testing.assert_allclose(sums[:, m.ABSOLUTE].sum(0), total.abs_error)
    np.testing.assert_allclose(sums[:, m.SQUARED].sum(0), total.squared_error)
    np.testing.assert_allclose(sums[:, m.PINBALL].sum(0) / total.n, m.pinball(total))
    error = np.where(mask, y.astype(float) - mean, 0)
    np.testing.assert_allclose(sums[:, m.ERROR], error.sum(2))


def test_r2_keeps_its_digits_far_from_zero():
    noise = np.random.default_rng(0).normal(size=(200, 1, 5, 1))
    near = Scores.of(noise, noise < 9, 0.5 * noise, None, (), (0.1,))
    far = Scores.of(noise + 1e7, noise < 9, 0.5 * noise + 1e7, None, (), (0.1,), centre=(1e7,))
    assert m.r2(far).item() == pytest.approx(m.r2(near).item(), rel=1e-7)
    with pytest.raises(InputError, match="centre"):
        Scores.zeros(1, (), (0.1,), (0.0, 0.0))


def test_pooling_is_over_sums_and_not_over_figures(windows):
    y, mask, mean, _ = windows
    one = Scores.of(y[..., :1], mask[..., :1], mean[..., :1], None, (), FLOOR[:1]).pooled([1, 2, 3])
    error = (y.astype(float) - mean)[:, 1:4, :, 0][mask[:, 1:4, :, 0]]
    assert m.rmse(one).shape == (1, 1)
    assert m.rmse(one).item() == pytest.approx(np.sqrt((error**2).mean()))
    assert score(windows).pooled(slice(1, 4)).n.sum() == mask[:, 1:4].sum()


def test_what_was_not_observed_has_no_influence(windows):
    y, mask, mean, quantiles = (array.copy() for array in windows)
    y[~mask], mean[~mask], quantiles[~mask] = np.nan, 1e9, np.nan
    assert score((y, mask, mean, quantiles)).to_json() == score(windows).to_json()


def test_zero_is_a_target_like_any_other():
    y = np.zeros((1, 1, 1, 1))
    scores = Scores.of(y, y == 0, y + 0.5, None, (), (0.1,))
    assert (scores.n.item(), m.mae(scores).item()) == (1, 0.5)
    assert np.isnan(m.mape(scores).item()) and m.mape_share(scores).item() == 0
    assert np.isnan(m.wape(scores).item())


def test_r2_of_a_constant_target_is_undefined_and_not_minus_infinity():
    for n in range(2, 50):
        y = np.full((n, 1, 1, 1), 0.3)
        assert np.isnan(m.r2(Scores.of(y, y > 0, y + 0.01, None, (), (0.1,))).item())


def test_a_target_on_a_quantile_is_at_or_below_it_and_inside_its_interval():
    y = np.full((1, 1, 1, 1), 0.3)
    scores = Scores.of(y, y > 0, y, np.repeat(y[..., None], 2, axis=-1), (0.25, 0.75), (0.1,))
    assert m.calibration(scores).tolist() == [[[1, 1]]] and m.coverage(scores, 0.5).item() == 1


def test_nothing_counted_is_nan_in_arrays_and_none_in_json():
    empty = Scores.zeros(H, QUANTILES, FLOOR)
    assert all(np.isnan(figure).all() for figure in every_figure(empty).values())
    figures = m.figures(empty, SCALE)
    assert len(figures) == F and set(figures[0].values()) == {None}
    json.dumps(figures, allow_nan=False)


def test_a_point_forecast_has_no_quantile_figures(windows):
    y, mask, mean, _ = windows
    scores = Scores.of(y, mask, mean, None, (), FLOOR)
    for figure in (m.pinball(scores), m.coverage(scores, 0.9), m.wis(scores)):
        assert figure.shape == (H, F) and np.isnan(figure).all()


def test_json_keeps_every_digit(windows):
    scores = score(windows)
    again = Scores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False)))
    assert again.to_json() == scores.to_json()
    np.testing.assert_array_equal((again + scores).pinball, 2 * scores.pinball)
    point = Scores.zeros(H, (), FLOOR)
    assert Scores.from_json(point.to_json()).pinball.shape == (H, F, 0)


def test_scores_of_other_levels_are_refused(windows):
    with pytest.raises(InputError, match=r"\(0\.5,\)"):
        score(windows) + Scores.zeros(H, (0.5,), FLOOR)
    with pytest.raises(InputError, match="quantiles"):
        Scores.of(*windows, (0.5,), FLOOR)


def test_a_forecast_that_is_not_a_number_is_an_error_and_not_a_drop(windows):
    y, mask, mean, quantiles = (array.copy() for array in windows)
    mean[np.unravel_index(np.flatnonzero(mask)[0], mask.shape)] = np.nan
    with pytest.raises(InputError, match="mean: not a finite number at 1 of"):
        score((y, mask, mean, quantiles))


def test_the_median_entity_stands_beside_the_pooled_error(windows):
    y, mask, mean, _ = windows
    mask = mask.copy()
    mask[:, :, 4] = False
    whole = PerEntity.of(y, mask, mean, np.arange(N), STD)
    error = np.where(mask, np.abs(y.astype(float) - mean) / STD, np.nan)
    by_entity = np.nanmean(error[:, :, :4], (0, 1))
    np.testing.assert_allclose(whole.scaled_mae()[:4], by_entity)
    np.testing.assert_allclose(whole.median(), np.median(by_entity, axis=0), err_msg="of those observed")
    assert np.isnan(whole.scaled_mae()[4]).all()
    pooled = Scores.of(y, mask, mean, None, (), FLOOR, scale=STD)
    np.testing.assert_allclose(whole.scaled_error.sum(0), pooled.scaled_error.sum(0))
    assert np.isnan(PerEntity.zeros(0, F).median()).all()


def test_groups_of_entities_add_up_by_position_and_unknown_ones_do_not_count(windows):
    y, mask, mean, _ = windows
    whole = PerEntity.of(y, mask, mean, np.arange(N), STD)
    own = np.arange(1.0, N + 1)[:, None] * STD

    def part(windows, nodes):
        given = (array[windows][:, :, nodes] for array in (y, mask, mean))
        return PerEntity.of(*given, nodes, STD)

    first, second = slice(0, 20), slice(20, None)
    parts = [part(where, nodes) for where in (first, second) for nodes in ([3, 1], [0, 4, 2])]
    for order in (parts, parts[::-1]):
        total = sum(order, PerEntity.zeros(0, F))
        np.testing.assert_array_equal(total.n, whole.n)
        np.testing.assert_allclose(total.scaled_error, whole.scaled_error, rtol=1e-12)

    strangers = PerEntity.of(y, mask, mean, [-1, 2, -1, -1, 0], own)
    assert strangers.nodes.tolist() == [0, 2]
    assert strangers.n.tolist() == whole.n[[4, 1]].tolist()
    np.testing.assert_allclose(strangers.scaled_error[[0, 2]], whole.scaled_error[[4, 1]] / [[5], [2]])
    assert PerEntity.of(y, mask, mean, [-1] * N).n.shape == (0, F)
    with pytest.raises(InputError, match="median"):
        PerEntity.of(y, mask, mean[:, :, :2], np.arange(N))
