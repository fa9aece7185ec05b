"""The forecast of one group: the model's where it can be used, the naive one with the reason elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import torch
from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.evaluation.naive import DAILY_MAXIMUM, LAST_VALUE, YESTERDAY
from fleetcast.forecasting.cold_start import Kin, _neighbours, begin_earlier
from fleetcast.forecasting.predict import ForecastOptions, GroupForecast, Selected, predict, rows
from fleetcast.forecasting.run import read_selected
from fleetcast.models import saving
from fleetcast.models.base import Output
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.store import Store
from fleetcast.windows.manifest import Manifest, Scaler
from pydantic import ValidationError

HORIZON, HISTORY, DAY = 4, 8, 96


def forecast(
    store: Store, data: Manifest, *, selected: Selected | None = None, share=0.25, gone_after=0
) -> GroupForecast:
    """The first group's forecast."""
    last = [shard for shard in data.shards if shard.group == 0][-1]
    options = ForecastOptions(min_history_share=share, gone_after=gone_after)
    return predict(store, data, last, selected or read_selected(store), options)


@pytest.fixture
def instead(monkeypatch) -> Callable[..., None]:
    """`instead(f)`: the selected model gives `f(batch) [B, H, N, F]`, and the same as every quantile."""

    def use(f) -> None:
        def model(batch):
            mean = f(batch)
            return Output(mean, mean[..., None].expand(*mean.shape, len(QUANTILES)))

        monkeypatch.setattr(saving, "load", lambda store, folder: model)

    return use


# -- the model's forecast ----------------------------------------------------------------------------------


def test_every_entity_metric_and_step_has_a_row_with_rising_quantiles(serve, values):
    store, data = serve(values)
    found = forecast(store, data)
    assert found.fallback == [None, None, None]
    table = rows(found, data, "stgnn", LAST_VALUE)
    assert table.schema.equals(schemas.FORECASTS)

    frame = pl.DataFrame(pl.from_arrow(table)).with_columns(pl.col("entity", "metric").cast(pl.String))
    end = data.start + data.step * data.steps
    times = [datetime.fromtimestamp(end + data.step * h, UTC) for h in range(HORIZON)]
    assert frame.select("entity", "metric", "time").rows() == [
        (entity, metric, time) for entity in ("e0", "e1", "e2") for metric in data.metrics for time in times
    ]
    assert frame["model"].unique().to_list() == ["stgnn"]
    assert frame["fallback"].null_count() == len(frame)

    quantiles = frame.select(quantile_name(q) for q in QUANTILES).to_numpy()
    assert (np.diff(quantiles) >= 0).all()
    cell = (pl.col("entity") == "e1") & (pl.col("metric") == "memory")
    np.testing.assert_array_equal(frame.filter(cell)["mean"], found.mean[:, 1, 1].astype(np.float32))
    of_cell = frame.filter(cell).select(quantile_name(q) for q in QUANTILES).to_numpy()
    np.testing.assert_array_equal(of_cell, found.quantiles[:, 1, 1].astype(np.float32))


@pytest.mark.parametrize(("level", "expected"), [(50.0, [1, 1, np.inf]), (-50.0, [0, 0, 0])])
def test_fractions_stay_within_the_capacity_and_nothing_is_negative(serve, values, instead, level, expected):
    store, data = serve(values)
    instead(lambda batch: torch.full_like(batch.y, level))
    found = forecast(store, data)
    assert found.fallback == [None] * 3
    for f, bound in enumerate(expected):
        if np.isfinite(bound):
            assert (found.mean[:, :, f] == bound).all()
            assert (found.quantiles[:, :, f] == bound).all()
        else:
            assert found.mean[:, :, f].min() > 2 * values[:, :, f].max(), "a rate has no capacity"


def test_the_model_s_own_scaler_is_used_not_the_dataset_s(serve, values, instead):
    store, data = serve(values)
    before = forecast(store, data)
    scaler = Scaler(mean=tuple(3 + m for m in data.scaler.mean), std=tuple(5 * s for s in data.scaler.std))
    other = data.model_copy(update={"scaler": scaler})
    after = forecast(store, other)
    np.testing.assert_array_equal(after.mean, before.mean)
    np.testing.assert_array_equal(after.quantiles, before.quantiles)
    np.testing.assert_array_equal(after.history, before.history)

    instead(lambda batch: torch.zeros_like(batch.y))
    mean = np.asarray(read_selected(store).scaler.mean)
    np.testing.assert_allclose(forecast(store, other).mean, np.broadcast_to(mean, (HORIZON, 3, 3)))


def test_the_history_is_what_was_observed_in_three_horizons_before(serve, values):
    values[-5:-2, 1, 0] = np.nan
    store, data = serve(values)
    np.testing.assert_allclose(
        forecast(store, data).history, values[-3 * HORIZON :, :3], rtol=1e-5, atol=1e-6
    )


# -- when the naive forecast stands in ---------------------------------------------------------------------


def stand_in(store: Store, data: Manifest) -> GroupForecast:
    """What the group gets where the model is not used at all."""
    selected = read_selected(store)
    return forecast(store, data, selected=replace(selected, rung=selected.naive))


def same(one: GroupForecast, other: GroupForecast, entities: list[int]) -> None:
    np.testing.assert_array_equal(one.mean[:, entities], other.mean[:, entities])
    np.testing.assert_array_equal(one.quantiles[:, entities], other.quantiles[:, entities])


def test_an_entity_with_too_little_history_gets_the_naive_and_the_others_keep_the_model_s(serve, values):
    values[-HISTORY:-1, 1] = np.nan  # an eighth of the look-back is left
    store, data = serve(values)
    own = forecast(store, data, share=0)
    assert own.fallback == [None] * 3
    found = forecast(store, data)
    assert found.fallback == [None, "less than 25% of the look-back is observed", None]
    same(found, own, [0, 2])
    same(found, stand_in(store, data), [1])
    assert not np.array_equal(found.mean[:, 1], own.mean[:, 1])

    table = rows(found, data, "stgnn", LAST_VALUE)
    models = dict(zip(table["entity"].to_pylist(), table["model"].to_pylist(), strict=True))
    assert models == {"e0": "stgnn", "e1": LAST_VALUE, "e2": "stgnn"}


def test_the_share_of_the_look_back_that_must_be_observed_is_a_share():
    with pytest.raises(ValidationError, match="min_history_share"):
        ForecastOptions(min_history_share=25)


def test_an_entity_of_which_only_older_values_are_known_gets_a_finite_forecast(serve, values):
    values[-HISTORY:, 2] = np.nan
    store, data = serve(values)
    found = forecast(store, data, gone_after=(HISTORY + 1) * data.step)
    assert found.fallback[2] == "less than 25% of the look-back is observed"
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.quantiles).all()


def test_an_entity_of_which_nothing_is_known_any_more_is_gone_and_the_others_do_not_change(serve, values):
    values[-HISTORY:, 1] = np.nan
    store, data = serve(values)
    found = forecast(store, data)
    assert found.entities == ("e0", "e2")
    np.testing.assert_allclose(found.gone, values[-3 * HORIZON :, 1:2], rtol=1e-5)
    whole = forecast(store, data, gone_after=(HISTORY + 1) * data.step)
    assert whole.entities == ("e0", "e1", "e2")
    np.testing.assert_array_equal(found.mean, whole.mean[:, [0, 2]])
    assert set(rows(found, data, "stgnn", LAST_VALUE)["entity"].to_pylist()) == {"e0", "e2"}


def test_an_entity_for_which_the_model_gives_no_number_gets_the_naive(serve, values, instead):
    store, data = serve(values)
    instead(lambda batch: torch.zeros_like(batch.y))
    whole = forecast(store, data)

    def one_is_missing(batch):
        mean = torch.zeros_like(batch.y)
        mean[0, 2, 0, 1] = float("nan")
        return mean

    instead(one_is_missing)
    found = forecast(store, data)
    assert found.fallback == ["the model's forecast is not a finite number", None, None]
    same(found, whole, [1, 2])
    same(found, stand_in(store, data), [0])


def test_where_the_model_raises_all_get_the_naive_with_the_error_as_reason(serve, values, instead):
    store, data = serve(values)

    def broken(batch):
        raise ZeroDivisionError("no such thing")

    instead(broken)
    found = forecast(store, data)
    assert found.fallback == ["the model failed: ZeroDivisionError: no such thing"] * 3
    same(found, stand_in(store, data), [0, 1, 2])


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), (b"\x08\0\0\0", "not a whole")])
def test_where_the_weights_cannot_be_read_all_get_the_naive(serve, values, content, reason):
    store, data = serve(values)
    file = f"{read_selected(store).folder}/weights.safetensors"
    store.remove(file)
    if content is not None:
        with store.write(file) as weights:
            weights.write(content)
    found = forecast(store, data)
    assert len(set(found.fallback)) == 1
    assert found.fallback[0].startswith("the model cannot be loaded: ")
    assert "weights.safetensors" in found.fallback[0]
    assert reason in found.fallback[0]
    same(found, stand_in(store, data), [0, 1, 2])


def test_a_model_that_is_not_better_is_replaced_and_the_reason_names_both_errors(serve, values):
    store, data = serve(values, rung=LAST_VALUE)
    selected = replace(read_selected(store), naive=LAST_VALUE, reason="validation error 0.7, last value 0.5")
    found = forecast(store, data, selected=selected)
    reason = "stgnn is not better than last value (validation error 0.7, last value 0.5)"
    assert found.fallback == [reason] * 3


def test_the_reason_of_the_selection_names_both_errors_of_the_validation_part(serve, values):
    store, _ = serve(values)
    selected = read_selected(store)
    errors = store.read_json(f"{selected.folder}/metrics.json")["summary"]["validation_error"]
    naive = min((LAST_VALUE, YESTERDAY, DAILY_MAXIMUM), key=errors.__getitem__)
    assert selected.naive == naive
    assert selected.reason == f"validation error {errors['stgnn']:.4f}, {naive} {errors[naive]:.4f}"


@pytest.mark.parametrize("rung", [LAST_VALUE, YESTERDAY])
def test_the_stand_in_is_the_naive_value_with_its_own_calibrated_quantiles(serve, values, rung):
    values[-3:, 1, 0] = np.nan
    values[-DAY + 2, 2, 2] = np.nan  # the third step to forecast, a day before
    store, data = serve(values)
    selected = replace(read_selected(store), rung=rung, naive=rung)
    found = forecast(store, data, selected=selected)

    last = np.array(
        [[v[np.isfinite(v)][-1] for v in of_entity.T] for of_entity in values[:, :3].swapaxes(0, 1)]
    )
    expected = np.repeat(last[None].astype(np.float64), HORIZON, axis=0)
    if rung == YESTERDAY:
        before = values[-DAY : -DAY + HORIZON, :3]
        expected = np.where(np.isfinite(before), before, expected)
        assert expected[2, 2, 2] == last[2, 2]
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)

    shifts = selected.calibration["shifts"][rung]  # horizon steps are buckets of their own
    assert shifts.shape == (HORIZON, 3, len(QUANTILES))
    quantiles = expected[..., None] + shifts[:, None] * np.asarray(data.scaler.std)[:, None]
    high = np.array([1, 1, np.inf])[:, None]
    np.testing.assert_allclose(found.quantiles, np.clip(quantiles, 0, high), rtol=1e-5, atol=1e-6)


# -- models that do not fit --------------------------------------------------------------------------------


def test_windows_that_the_model_was_not_made_for_are_refused_naming_both(serve, values):
    store, data = serve(values)
    selected = read_selected(store)
    selected.check(data)
    for name, given, trained in [
        ("level", "service", "machine"),
        ("step", 300, 900),
        ("metrics", ("cpu", "memory"), ["cpu", "memory", "request_rate"]),
        ("history", HISTORY + 1, HISTORY),
        ("horizon", HORIZON + 1, HORIZON),
        ("lags", (DAY, 7 * DAY), [DAY]),
    ]:
        with pytest.raises(InputError) as refusal:
            selected.check(data.model_copy(update={name: given}))
        shown = list(given) if isinstance(given, tuple) else given
        assert f"windows test: {name} {shown}, " in str(refusal.value)
        assert f"model {selected.folder} was trained with {trained};" in str(refusal.value)


@pytest.mark.parametrize("file", ["manifest.json", "config.json"])
def test_a_selected_model_that_is_not_there_is_an_error_that_names_its_file(serve, values, file):
    store, data = serve(values)
    folder = read_selected(store).folder
    store.remove(f"{folder}/{file}")
    with pytest.raises(InputError, match=f"{folder}/{file}: no such file"):
        read_selected(store).check(data)


# -- entities that have only just begun --------------------------------------------------------------------


def replicas(store: Store, data: Manifest) -> Manifest:
    """The same entities as containers, of which e0 and e1 are of one service."""
    services = ["web", "web", "db", "db", "db"]
    described = pl.DataFrame(
        {"entity": [f"e{n}" for n in range(5)], "kind": ["container"] * 5, "service": services}
    )
    store.write_table("entities/entities.parquet", described.to_arrow())
    return data.model_copy(update={"level": "container"})


def test_the_past_of_a_new_replica_is_its_siblings_at_its_own_level(serve, values, instead):
    values[:, 1] = 0.5 * values[:, 0]
    whole = values.copy()
    values[:-1, 1] = np.nan  # it has one sample
    store, data = serve(values)
    data = replicas(store, data)
    instead(lambda batch: batch.seasonal[..., 0])  # what was a day before
    found = forecast(store, data)
    expected = whole[-DAY : HORIZON - DAY, :3]
    np.testing.assert_allclose(found.mean[:, :2], expected[:, :2], rtol=1e-4)
    assert found.cold == [None, "siblings", None]
    assert found.fallback == [None, None, None]
    table = rows(found, data, "stgnn", LAST_VALUE)
    models = dict(zip(table["entity"].to_pylist(), table["model"].to_pylist(), strict=True))
    assert models == {"e0": "stgnn", "e1": "stgnn (cold start)", "e2": "stgnn"}
    np.testing.assert_array_equal(np.isfinite(found.history[:-1, 1]), False)  # nobody saw what was filled


def test_the_past_of_a_new_service_is_its_neighbours_as_share_of_their_own_level(values):
    """e0 calls e1, is called by e2 twice as much, and does what both do, at its own level."""
    whole = values.copy()
    shape = 1 + 0.3 * np.sin(np.arange(len(values)) / 5)[:, None]
    for n, level in enumerate((10, 1, 100)):
        whole[:, n] = level * shape
    given = whole.copy()
    given[:-20, 0] = np.nan
    edges = np.array([[0, 2, 3], [1, 0, 4]])
    kin = _neighbours(range(3), edges, np.array([1, 2, 5], np.float32))
    assert kin == [([1, 2], [1.0, 2.0]), ([0], [1.0]), ([0], [2.0])]
    families = [[Kin("neighbours", np.array(at), np.array(w))] for at, w in kin]
    filled, new = begin_earlier(given, families, history=40)
    assert new == {0: "neighbours"}
    np.testing.assert_allclose(filled, whole, rtol=1e-4)


def test_siblings_come_before_neighbours_and_nobody_stands_in_for_one_who_has_a_past(values):
    values[:-20, 0] = np.nan
    siblings, neighbours = (
        Kin(kind, np.array([at]), np.ones(1)) for kind, at in (("siblings", 1), ("neighbours", 2))
    )
    both = [[siblings, neighbours]] * 3
    assert begin_earlier(values, both, history=40)[1] == {0: "siblings"}
    values[:-20, 1] = np.nan  # the sibling has just begun as well
    assert begin_earlier(values, both, history=40)[1] == {0: "neighbours", 1: "neighbours"}
    assert begin_earlier(values, both, history=10)[1] == {}


def test_a_new_replica_without_siblings_and_an_old_one_with_a_gap_are_as_they_are(serve, values):
    values[:-1, 2] = np.nan  # new, but its siblings are in another group
    values[-HISTORY:-1, 1] = np.nan  # a gap
    store, data = serve(values)
    found = forecast(store, replicas(store, data))
    assert found.cold == [None, None, None]
    assert found.fallback == [None, *["less than 25% of the look-back is observed"] * 2]
