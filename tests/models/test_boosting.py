"""lightgbm is trained on a fixed, bounded sample, and is in the store what it was when fitted."""

import dataclasses

import numpy as np
import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import MODELS, build, saving
from fleetcast.models.boosting import Lightgbm
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store
from fleetcast.windows.batch import Batch
from samples import GEOMETRY, NODES, batch, forecast, window

FOLDER = "models/lightgbm/1"


def fitted(
    train: list[Batch],
    validation: list[Batch] | None = None,
    geometry: Geometry = GEOMETRY,
    seed: int = 0,
    **options,
) -> Lightgbm:
    torch.manual_seed(seed)
    module = build("lightgbm", {"trees": 5} | options, geometry)
    module.fit(lambda: train, lambda: train if validation is None else validation)
    return module


def assert_equal(a: Lightgbm, b: Lightgbm, given: Batch) -> None:
    one, other = forecast(a, given), forecast(b, given)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.quantiles, other.quantiles)


# -- what it learns ------------------------------------------------------------------------------------------


def uneven(windows: int, seed: int) -> Batch:
    """The target of cpu follows the last value, with noise that grows with it; that of memory its season."""
    given = batch(windows)
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(given.x.shape, generator=random)
    seasonal = torch.rand(given.seasonal.shape, generator=random)
    noise = torch.randn(given.y.shape, generator=random)
    last = x[:, -1:].expand_as(given.y)
    y = torch.where(torch.tensor([True, False]), last + 0.5 * last * noise, seasonal[..., 1] + 0.05 * noise)
    everything = {name: torch.ones_like(getattr(given, name)) for name in ("mask", "seasonal_mask", "y_mask")}
    origins = torch.arange(windows) + 1000 * seed
    return dataclasses.replace(given, x=x, seasonal=seasonal, y=y, origins=origins, **everything)


def test_quantiles_rise_and_hold_their_share_also_where_the_noise_is_wide():
    train, validation, test = uneven(600, 1), uneven(150, 2), uneven(300, 3)
    output = forecast(fitted([train], [validation], trees=80), test)
    assert (output.quantiles.diff(dim=-1) >= 0).all()
    last = test.x[:, -1:, :, 0].expand(test.y.shape[:3])
    for low, high in ((0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        inside = (last >= low) & (last < high)
        below = test.y[..., 0, None] <= output.quantiles[..., 0, :]
        torch.testing.assert_close(
            below[inside].float().mean(0), torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=0.05
        )
        width = (output.quantiles[..., 0, 2] - output.quantiles[..., 0, 0])[inside].mean()
        assert width == pytest.approx(2 * 1.2816 * 0.5 * (low + high) / 2, rel=0.2)
    expected = torch.stack([last, test.seasonal[..., 1, 1]], -1)
    assert (output.mean - expected).square().mean((0, 1, 2)).sqrt().tolist() == pytest.approx([0, 0], abs=0.1)


@pytest.mark.parametrize("of", ["last step", "mean"])
def test_it_sees_by_how_much_a_load_is_above_its_season(of):
    """Each level is far from the others, so the difference of two of them is lost on trees of both."""
    given = uneven(600, 1)
    random = torch.Generator().manual_seed(5)
    above = torch.randn(given.x.shape, generator=random)
    before = 100 * torch.randn(given.seasonal_x.shape, generator=random)
    y = above[:, -1:] if of == "last step" else above.mean(1, keepdim=True)
    given = dataclasses.replace(
        given,
        x=before[..., 0] + above,
        seasonal_x=before,
        seasonal_x_mask=torch.ones_like(given.seasonal_x_mask),
        y=y.expand_as(given.y).clone(),
    )
    mean = forecast(fitted([given], trees=60), given).mean
    assert (mean - given.y).square().mean() < 0.05 * given.y.var()


def test_quantiles_that_cross_are_sorted():
    given = batch(40)
    module = fitted([given])
    rising = forecast(module, given).quantiles
    for of_metric in module._boosters:
        of_metric[1:] = of_metric[:0:-1]
    assert torch.equal(forecast(module, given).quantiles, rising)


def test_it_can_tell_entities_and_horizon_steps_apart_and_takes_strangers_alike():
    given = batch(200)
    level = given.nodes.float()[:, None] + 10 * torch.arange(4.0)[:, None, None]
    given = dataclasses.replace(given, y=level.expand_as(given.y).clone())
    module = fitted([given], trees=60)
    mean = forecast(module, given).mean
    assert (mean - given.y).square().mean().sqrt() < 0.2
    strangers = forecast(module, dataclasses.replace(given, nodes=torch.full((NODES,), -1))).mean
    assert strangers.std(2).mean() < 0.1 * mean.std(2).mean(), "all of them alike"
    assert (strangers - given.y).abs().max() < 6, "within the levels of the step"
    assert "==" in set(module._boosters[0][0].trees_to_dataframe()["decision_type"]), "ids have no order"


def test_the_validation_part_decides_when_to_stop():
    train = uneven(60, 1)
    backwards = dataclasses.replace(train, y=-train.y)
    same, other = (fitted([train], [given], trees=40) for given in (train, backwards))
    assert [booster.num_trees() for booster in same._boosters[0]] == [40] * 4
    assert other._boosters[0][0].num_trees() == 1


def test_a_metric_that_was_never_observed_is_forecast_as_the_mean():
    given = batch(8)
    given.y_mask[..., 1] = False
    output = forecast(fitted([given]), given)
    assert (output.mean[..., 1] == 0).all() and (output.quantiles[..., 1, :] == 0).all()
    assert output.mean[..., 0].std() > 0
    seen = batch(8)
    assert forecast(fitted([seen], [given]), seen).mean[..., 1].std() > 0, "not seen in validation only"


def test_fillings_of_the_look_back_are_neutral():
    module, given = fitted([batch(8)]), batch()
    filled = dataclasses.replace(given, x=torch.where(given.mask, given.x, 99.0))
    assert_equal(module, module, filled)
    assert torch.equal(forecast(module, given).mean, forecast(module, filled).mean)


# -- a long look-back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "steps"),
    [
        (24, list(range(24))),
        (25, [1, 3, 5, 7, 9, 11, *range(13, 25)]),
        (96, [*range(0, 84, 7), *range(84, 96)]),
    ],
)
def test_of_a_long_look_back_it_sees_some_steps_and_a_summary(history, steps):
    geometry = GEOMETRY.model_copy(update={"history": history, "lags": ()})
    given = batch(2, geometry=geometry)
    given.mask[0, :, 0, 0] = False
    given = dataclasses.replace(given, nodes=torch.tensor([-1, 1, 2, 3, 4]))
    module = build("lightgbm", {}, geometry)
    at = torch.tensor([0, 1]), torch.tensor([3, 2]), torch.tensor([0, 4])  # window, step, node
    table = module._features(module._table(given, *at), 0)
    assert table.shape == (2, module.features)

    x = np.where(given.mask[1, :, 4, 0], given.x[1, :, 4, 0], np.nan)
    summary = [np.nanmean(x), np.nanmin(x), np.nanmax(x), np.nanstd(x)] if history > 24 else []
    last = np.where(given.mask[1, -1, 4], given.x[1, -1, 4], np.nan)
    expected = [*x[steps], *summary, *last, *given.time_y[1, 2], 2, 4]
    np.testing.assert_allclose(table[1], expected, rtol=1e-5)
    assert np.isnan(table[0, : len(steps) + len(summary) + 1]).all(), "nothing was observed"
    assert np.isnan(table[0, -1]), "a stranger"


# -- the sample ----------------------------------------------------------------------------------------------


def places(module: Lightgbm, given: list[Batch], most: int) -> np.ndarray:
    """[R, 3] of the sampled rows the origin, which is put into the time features, horizon step and node."""
    marked = [
        dataclasses.replace(b, time_y=b.origins.float()[:, None, None].expand_as(b.time_y)) for b in given
    ]
    table = module._sample(lambda: marked, most).table
    return table[:, -3:].astype(int)


def test_the_sample_is_bounded_uniform_and_fixed_by_the_seed():
    given = batch(100)
    torch.manual_seed(0)
    module = build("lightgbm", {}, GEOMETRY)
    sample = places(module, [given], 700)
    assert sample.shape == (700, 3) and len(np.unique(sample, axis=0)) == 700
    for column, values in enumerate((100, 4, NODES)):
        count = np.bincount(sample[:, column], minlength=values)
        expected = 700 / values
        assert ((count - expected) ** 2 / expected).sum() < 2 * values, "chi-square, of about `values`"
    assert np.array_equal(sample, places(module, [given], 700))
    torch.manual_seed(1)
    other = places(build("lightgbm", {}, GEOMETRY), [given], 700)
    both = {tuple(row) for row in sample} & {tuple(row) for row in other}
    assert 150 < len(both) < 350, "700 of 2,000 twice by chance: 245"


def test_the_sample_does_not_depend_on_the_size_and_order_of_batches():
    given = batch(100)
    module = build("lightgbm", {}, GEOMETRY)
    alone = [window(given, b) for b in torch.randperm(100, generator=torch.Generator().manual_seed(2))]
    for most in (1, 50, 10_000):
        whole = module._sample(lambda: [given], most)
        parts = module._sample(lambda: alone, most)
        assert np.array_equal(whole.key, parts.key)
        np.testing.assert_array_equal(whole.table, parts.table)
        np.testing.assert_array_equal(whole.y, parts.y)


def test_only_rows_with_an_observed_target_are_sampled_and_held_in_bounded_number():
    given = batch(100)
    given.y_mask[:] = False
    given.y_mask[:30, 1, 2, 1] = True
    module = build("lightgbm", {}, GEOMETRY)
    rows = module._sample(lambda: [given], 1000)
    assert rows.y.shape == (30, 2)
    assert np.isnan(rows.y[:, 0]).all() and np.isfinite(rows.y[:, 1]).all()
    assert len(rows.of(0).key) == 0 and rows.of(1).y.shape == (30,)


def test_memory_does_not_grow_with_the_stream(monkeypatch):
    from fleetcast.models import boosting

    held = []
    lowest = boosting._Rows.lowest

    def watched(parts, most):
        held.append(sum(len(part.key) for part in parts))
        return lowest(parts, most)

    monkeypatch.setattr(boosting._Rows, "lowest", watched)
    module = build("lightgbm", {}, GEOMETRY)
    stream = (dataclasses.replace(batch(10), origins=torch.arange(10) + 10 * i) for i in range(100))
    assert len(module._sample(lambda: stream, 100).key) == 100
    assert max(held) <= 2 * 100 + 100, "of 20,000 rows"
    assert len(held) < 15, "what cannot be in the sample is not looked at"


# -- the same each time, and in the store --------------------------------------------------------------------


def test_a_second_fit_gives_the_same_bits():
    given = batch(40)
    assert_equal(fitted([given]), fitted([given]), given)
    some = fitted([given], rows=100), fitted([given], rows=100, seed=1)
    assert not torch.equal(forecast(some[0], given).mean, forecast(some[1], given).mean), "another sample"


@pytest.fixture
def saved(tmp_path) -> tuple[Store, Lightgbm]:
    store, module = Store(str(tmp_path)), fitted([batch(40)])
    options = MODELS["lightgbm"](trees=5)
    saving.save(store, FOLDER, "lightgbm", options, GEOMETRY, module.state_dict())
    return store, module


def test_a_loaded_model_gives_the_same_bits(saved):
    store, module = saved
    loaded = saving.load(store, FOLDER)
    assert_equal(module, loaded, batch())
    again = loaded.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in module.state_dict().items())


def test_a_model_that_was_not_fitted_forecasts_zero_and_is_one_still_when_loaded(tmp_path):
    store, module = Store(str(tmp_path)), build("lightgbm", {}, GEOMETRY)
    saving.save(store, FOLDER, "lightgbm", MODELS["lightgbm"](), GEOMETRY, module.state_dict())
    for given in (module, saving.load(store, FOLDER)):
        assert (forecast(given, batch()).quantiles == 0).all()


def other(geometry: Geometry) -> torch.Tensor:
    return fitted([batch(40, geometry=geometry)], geometry=geometry).get_extra_state()


def damaged(state: torch.Tensor) -> torch.Tensor:
    return torch.cat([state[:2000], state[2001:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "the text of the trees is damaged"),
        (lambda state: state[:0], "the text of the trees is damaged"),
        (lambda state: state.float(), r"tensor _extra_state is torch.float32"),
        (lambda _: other(GEOMETRY.model_copy(update={"lags": ()})), "expected trees of 19 features"),
        (
            lambda _: other(GEOMETRY.model_copy(update={"quantiles": ()})),
            "expected for each of 2 metrics none or 4 models",
        ),
    ],
)
def test_what_is_not_its_trees_is_refused(saved, change, message):
    store, module = saved
    state = module.state_dict()
    state["_extra_state"] = change(state["_extra_state"])
    saving.save(store, FOLDER, "lightgbm", MODELS["lightgbm"](), GEOMETRY, state)
    with pytest.raises(InputError, match=rf"{FOLDER}/weights.safetensors: .*{message}"):
        saving.load(store, FOLDER)
