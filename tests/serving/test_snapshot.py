"""What is asked of a forecast in memory is what its rows say; what no one may act on is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.serving import answers
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import COLUMNS, Snapshot, column, newest
from fleetcast.serving.source import Forecasts
from fleetcast.store import Store
from night import NIGHT, republish

CLOCK = "trace"


@pytest.fixture(scope="module")
def snapshot(night: Store) -> Snapshot:
    return Snapshot.load(night, newest(night))


@pytest.fixture(scope="module")
def rows(night: Store) -> pl.DataFrame:
    found = pl.read_parquet(f"{night.root}/{newest(night)}/*.parquet")
    return found.with_columns(pl.col("entity", "metric").cast(pl.String)).sort("entity", "metric", "time")


def of(rows: pl.DataFrame, entity: str, metric: str) -> pl.DataFrame:
    return rows.filter(entity=entity, metric=metric)


def test_every_value_is_that_of_its_row(snapshot, rows):
    assert sorted(snapshot.entities) == rows["entity"].unique().sort().to_list()
    for entity in snapshot.entities:
        for f, metric in enumerate(snapshot.metrics):
            mine = of(rows, entity, metric)
            values = snapshot.values[snapshot.place(entity), f]
            assert np.array_equal(values, mine.select(COLUMNS).to_numpy())
            assert mine["time"].dt.epoch("s").to_list() == snapshot.seconds.tolist()
    table = pl.from_arrow(snapshot.table([3, 1], [1], 5))
    assert len(table) == 10
    expected = of(rows, snapshot.entities[3], snapshot.metrics[1]).head(5)
    assert table.head(5).select(COLUMNS).equals(expected.select(COLUMNS))


def test_peaks_and_limits_are_the_highest_and_the_first_of_the_rows(snapshot, rows):
    cpu = rows.filter(metric="cpu")
    highest = cpu.group_by("entity").agg(pl.col("q95").max()).sort("q95", descending=True)
    found = answers.peaks(snapshot, CLOCK, "cpu", 0.95, 5)["peaks"]
    assert [one["entity"] for one in found] == highest["entity"].head(5).to_list()
    assert [one["value"] for one in found] == highest["q95"].head(5).to_list()

    limit = float(highest["q95"][4]) - 1e-6
    above = cpu.filter(pl.col("q95") > limit).group_by("entity").agg(pl.col("time").min())
    found = answers.limits(snapshot, CLOCK, "cpu", limit, 0.95, 100)["limits"]
    when = dict(above.iter_rows())
    assert {one["entity"] for one in found} == set(when)
    assert [one["hours"] for one in found] == sorted(one["hours"] for one in found)
    for one in found:
        expected = (when[one["entity"]] - snapshot.issued).total_seconds() / 3600
        assert one["hours"] == pytest.approx(expected)
    never = answers.limits(snapshot, CLOCK, "cpu", 2.0, 0.95, 100)
    assert never["limits"] == []


def test_what_is_over_by_the_clock_is_not_looked_at(snapshot, monkeypatch):
    late = snapshot.issued + timedelta(hours=3, minutes=5)
    monkeypatch.setattr(answers, "now", lambda clock, of: late)
    found = answers.limits(snapshot, "wall", "cpu", 0.0, 0.95, 100)
    assert {one["hours"] for one in found["limits"]} == {0.0}, "above it in the step that runs"
    assert found["horizon_hours"] == 3
    assert all(one["time"] >= np.datetime64("2018-01-06T03:00") for one in answers.peaks(
        snapshot, "wall", "cpu", 0.5, 12)["peaks"])  # fmt: skip
    assert not answers.issue(snapshot, "wall")["stale"]
    monkeypatch.setattr(answers, "now", lambda clock, of: snapshot.valid_until)
    assert answers.issue(snapshot, "wall")["stale"]


def test_the_cluster_has_its_own_interval_and_a_part_of_it_one_of_the_same_dependence(snapshot):
    places = range(len(snapshot.entities))
    for metric in snapshot.metrics:
        whole, _ = snapshot.total(metric, None)
        made, how = snapshot.total(metric, places)
        assert np.allclose(whole[:, 0], made[:, 0], rtol=1e-5)
        wide = column(0.95)
        widths = [np.square(of[:, wide] - of[:, 0]).mean() ** 0.5 for of in (made, whole)]
        assert widths[0] == pytest.approx(widths[1], rel=0.1) or "correlation of 0.00" in how
        assert "correlation of" in how
        pair, _ = snapshot.total(metric, [0, 1])
        single = [snapshot.values[n, snapshot.metric(metric)] for n in (0, 1)]
        assert np.allclose(pair[:, 0], single[0][:, 0] + single[1][:, 0], rtol=1e-5)
        assert (np.diff(pair[:, 1:], axis=1) >= 0).all()
        assert (pair[:, wide] <= single[0][:, wide] + single[1][:, wide] + 1e-5).all(), (
            "never wider than the sum"
        )


def test_a_group_is_who_is_of_a_service_or_on_a_parent(night):
    snapshot = Snapshot.load(night, NIGHT)
    told = {
        name: {"service": f"app_{place % 2}", "parent": f"rack_{place // 6}"}
        for place, name in enumerate(snapshot.entities)
    }
    snapshot.__dict__["details"] = told
    assert snapshot.members("app_1", None) == [1, 3, 5, 7, 9, 11]
    assert snapshot.members(None, "rack_1") == [6, 7, 8, 9, 10, 11]
    assert snapshot.members("app_1", "rack_1") == [7, 9, 11]
    assert snapshot.members("nothing", None) == []


def test_search_finds_what_begins_so_first(snapshot):
    assert snapshot.search("") == sorted(snapshot.entities, key=lambda name: (len(name), name))
    assert snapshot.search("M_1") == ["m_1", "m_10", "m_11", "m_12"]
    assert snapshot.search("2") == ["m_2", "m_12"]
    assert snapshot.search("nothing") == []


def test_history_ends_where_the_forecast_begins(snapshot, night):
    times, values = snapshot.history("m_4")
    assert times[-1] == np.datetime64("2018-01-05T23:45")
    telemetry = pl.read_parquet(f"{night.root}/telemetry/*/machine-*.parquet").with_columns(
        pl.col("entity").cast(pl.String)
    )
    last = telemetry.filter(entity="m_4").filter(pl.col("time") >= datetime(2018, 1, 5, 23, 45, tzinfo=UTC))
    assert values[-1, 0] == pytest.approx(last["cpu"].mean(), abs=1e-5)


def test_neighbours_are_the_edges_of_the_last_slice(snapshot):
    found = answers.neighbours(snapshot, "m_3")["neighbours"]
    assert found
    for one in found:
        back = answers.neighbours(snapshot, one["entity"])["neighbours"]
        other = "downstream" if one["direction"] == "upstream" else "upstream"
        assert ("m_3", other, one["weight"]) in [(b["entity"], b["direction"], b["weight"]) for b in back]


def test_accuracy_is_that_of_the_forecast_before(store):
    """The earlier forecast is the truth itself but for one metric, which is off by a tenth."""
    first = Snapshot.load(store, newest(store))
    times, values = first.history("m_1")
    day = {int(t.astype(int)): v for t, v in zip(times, values, strict=True)}

    def truth(rows: pl.DataFrame) -> pl.DataFrame:
        told = [
            day[int(t.timestamp())][0 if metric == "cpu" else 1] + (0.1 if metric == "memory" else 0)
            if entity == "m_1"
            else 0.5
            for entity, metric, t in rows.select("entity", "metric", "time").iter_rows()
        ]
        return rows.with_columns(pl.Series(name, told, pl.Float32) for name in COLUMNS)

    earlier = republish(store, -1, truth)
    found = answers.accuracy(Snapshot.load(store, newest(store)), "m_1")
    assert found["issued"] == Snapshot.load(store, earlier).issued
    assert found["metrics"]["cpu"]["mean_absolute_error"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["memory"]["mean_absolute_error"] == pytest.approx(0.1, rel=1e-4)
    assert found["metrics"]["memory"]["inside_90"] == 0
    assert found["metrics"]["cpu"]["observations"] > 20


# -- taken up, or refused ------------------------------------------------------------------------------------


def broken(name: str):
    def change(rows: pl.DataFrame) -> pl.DataFrame:
        if name == "short":
            return rows.head(len(rows) - 24)
        value = {"not finite": float("nan"), "negative": -0.01}[name]
        at = pl.int_range(len(rows)) == 7
        return rows.with_columns(
            pl.when(at).then(pl.lit(value)).otherwise("q50").alias("q50").cast(pl.Float32)
        )

    return change


def test_a_newer_forecast_is_taken_up(store):
    forecasts = Forecasts(ServeOptions(store=store.uri))
    forecasts.refresh()
    first = forecasts.snapshot
    forecasts.refresh()
    assert forecasts.snapshot is first, "nothing new"
    folder = republish(store, 1)
    forecasts.refresh()
    assert forecasts.snapshot.folder == folder
    assert forecasts.snapshot.issued == first.issued + timedelta(days=1)
    assert forecasts.reason == ""


@pytest.mark.parametrize("wrong", ["short", "not finite", "negative"])
def test_a_forecast_that_no_one_may_act_on_is_refused_and_the_old_one_stays(store, wrong):
    forecasts = Forecasts(ServeOptions(store=store.uri))
    forecasts.refresh()
    first = forecasts.snapshot
    folder = republish(store, 1, broken(wrong))
    forecasts.refresh()
    assert forecasts.snapshot is first
    assert folder in forecasts.reason
    republish(store, 1)
    forecasts.refresh()
    assert forecasts.snapshot.folder > first.folder


def test_without_a_forecast_the_reason_is_given(tmp_path):
    forecasts = Forecasts(ServeOptions(store=str(tmp_path)))
    forecasts.refresh()
    assert forecasts.snapshot is None
    assert "no forecast is published" in forecasts.reason


def test_without_an_earlier_forecast_there_is_no_accuracy(snapshot):
    assert answers.accuracy(snapshot, "m_1") == {"entity": "m_1", "issued": None, "metrics": {}}


def test_the_next_nights_windows_do_not_disturb_what_is_served(store):
    """They have other entities and metrics, and lie where those of the forecast were."""
    before = Snapshot.load(store, NIGHT)
    expected, near = before.history("m_4"), answers.neighbours(before, "m_3")
    path = "windows/default/manifest.json"
    manifest = store.read_json(path)
    names = ["new" if name == "m_4" else name for name in manifest["groups"][0]]
    store.write_json(path, {**manifest, "groups": [names], "metrics": ["memory"]})
    for mine, theirs in zip(before.history("m_4"), expected, strict=True):
        assert np.array_equal(mine, theirs, equal_nan=True)
    assert answers.neighbours(before, "m_3") == near

    later = Snapshot.load(store, NIGHT)  # a server that starts now
    assert len(later.history("m_4")[0]) == 0
    times, values = later.history("m_5")
    assert np.isnan(values[:, later.metric("cpu")]).all()
    assert np.array_equal(
        values[:, later.metric("memory")],
        before.history("m_5")[1][-len(times) :, before.metric("memory")],
        equal_nan=True,
    )
    assert "m_4" not in [one["entity"] for one in answers.neighbours(later, "m_3")["neighbours"]]
    store.remove("windows")
    assert len(Snapshot.load(store, NIGHT).history("m_5")[0]) == 0, "the forecast is served all the same"


def test_columns_are_the_levels():
    assert [COLUMNS[column(q)] for q in QUANTILES] == [quantile_name(q) for q in QUANTILES]
    with pytest.raises(InputError, match=r"quantile: 0\.33, expected one of 0\.05"):
        column(0.33)
