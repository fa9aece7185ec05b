"""The naive rungs forecast what their names say, and never look at the targets."""

import dataclasses

import torch
from fleetcast.evaluation.naive import duration, last_value, naive_rungs
from fleetcast.windows.batch import Batch, Edges

B, L, H, N, F, S = 2, 4, 3, 2, 1, 2


def batch() -> Batch:
    """Everything observed: the look-back counts 0 … 3, the lags give 10 + step and 20 + step."""
    steps = torch.arange(H, dtype=torch.float32).view(1, H, 1, 1)
    seasonal = torch.stack([10 + steps, 20 + steps], dim=-1).expand(B, H, N, F, S)
    return Batch(
        x=torch.arange(L, dtype=torch.float32).view(1, L, 1, 1).expand(B, L, N, F).clone(),
        mask=torch.ones(B, L, N, F, dtype=torch.bool),
        time_x=torch.zeros(B, L, 2),
        time_y=torch.zeros(B, H, 2),
        seasonal_x=torch.zeros(B, L, N, F, S),
        seasonal_x_mask=torch.zeros(B, L, N, F, S, dtype=torch.bool),
        seasonal=seasonal.clone(),
        seasonal_mask=torch.ones(B, H, N, F, S, dtype=torch.bool),
        edges=Edges(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0)),
        nodes=torch.arange(N),
        y=torch.full((B, H, N, F), torch.nan),
        y_mask=torch.ones(B, H, N, F, dtype=torch.bool),
        origins=torch.zeros(B, dtype=torch.int64),
    )


def test_last_value_holds_the_last_observation():
    given = batch()
    given.mask[0, 2:, 1] = False
    forecast = last_value(given)
    assert forecast.shape == (B, H, N, F)
    assert (forecast[0, :, 0] == 3).all() and (forecast[0, :, 1] == 1).all() and (forecast[1] == 3).all()


def test_last_value_of_nothing_is_the_training_mean():
    given = batch()
    given.mask[1, :, 0] = False
    given.x[1, :, 0] = 7  # fillings
    assert (last_value(given)[1, :, 0] == 0).all()


def test_a_filling_that_is_not_a_number_does_not_reach_the_forecast():
    given = batch()
    given.mask[0, 3] = False
    given.x[0, 3] = torch.nan
    assert (last_value(given)[0] == 2).all()


def test_seasonal_takes_the_lag_and_else_the_last_value():
    given = batch()
    given.seasonal_mask[0, 1, 1, 0, 0] = False
    rungs = naive_rungs(lags=[288, 2016], step=300)
    yesterday, last_week = rungs["same time yesterday"](given), rungs["same time last week"](given)
    assert yesterday[0, :, 0, 0].tolist() == [10, 11, 12]
    assert yesterday[0, :, 1, 0].tolist() == [10, 3, 12]
    assert last_week[1, :, 0, 0].tolist() == [20, 21, 22]


def test_the_maximum_is_the_highest_observation_a_week_before_held():
    given = batch()
    given.seasonal_mask[0, 2, 1, 0, 1] = False
    given.seasonal[0, 2, 1, 0, 1] = torch.nan
    given.seasonal_mask[1, :, 0, 0, 1] = False
    given.seasonal[1, :, 1, 0, 1] = torch.tensor([-1.0, -5.0, -3.0])
    forecast = naive_rungs(lags=[288, 2016], step=300)["weekly maximum"](given)
    assert forecast.shape == (B, H, N, F)
    assert forecast[0, :, 0, 0].tolist() == [22, 22, 22]
    assert forecast[0, :, 1, 0].tolist() == [21, 21, 21], "not the filling"
    assert forecast[1, :, 0, 0].tolist() == [3, 3, 3], "the last value where nothing was observed"
    assert forecast[1, :, 1, 0].tolist() == [-1, -1, -1]
    daily = naive_rungs(lags=[288], step=300)["daily maximum"](given)
    assert daily[0, :, 0, 0].tolist() == [12, 12, 12]


def test_rungs_are_named_by_their_lag():
    assert list(naive_rungs([24, 168, 48, 6], 3600)) == [
        "last value",
        "same time yesterday",
        "same time last week",
        "same time 2 days ago",
        "same time 6 h ago",
        "weekly maximum",
    ]
    assert [list(naive_rungs(lags, 3600))[-1] for lags in ([24], [6, 48], [24, 168, 336], [6], [])] == [
        "daily maximum",
        "maximum 2 days ago",
        "weekly maximum",
        "maximum 6 h ago",
        "last value",
    ]
    assert [duration(s) for s in (90, 300, 5400, 86_400)] == ["90 s", "5 min", "90 min", "1 day"]


def test_the_targets_are_never_read():
    given = batch()
    blind = dataclasses.replace(given, y=given.y + 1, y_mask=~given.y_mask)
    for forecast in naive_rungs([288, 2016], 300).values():
        assert torch.equal(forecast(given), forecast(blind)) and forecast(given).isfinite().all()
