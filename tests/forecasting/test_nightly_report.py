"""The report of a night: its frames are those of the published forecast, and its page can be drawn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from fleetcast.evaluation.metrics import scaled_mae
from fleetcast.evaluation.naive import DAILY_MAXIMUM, LAST_VALUE, YESTERDAY
from fleetcast.evaluation.report import COLUMNS, NightlyReport, render
from fleetcast.forecasting import nightly as night
from fleetcast.forecasting.nightly import NightlyOptions, build_report, nightly
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import forecast
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.store import MANIFEST
from fleetcast.training.register import SELECTED
from pydantic import ValidationError

END = datetime(2018, 1, 3, 2, 15, tzinfo=UTC)  # 200 steps of 15 minutes after 2018-01-01 00:15
QUARTER = timedelta(minutes=15)
INGESTED = {
    "rows_read": {"machine_usage": 1000, "machine_meta": 5},
    "rows_rejected": {"machine_usage": {"time is not a number": 3, "cpu is not a number": 4}},
    "values_nulled": {"machine_usage": {"cpu": 2}, "container_usage": {"memory": 5}},
}
NOTHING_LOST = {"rows_read": {"machine_usage": 1000}, "rows_rejected": {}, "values_nulled": {}}
OPTIONS = NightlyOptions.model_validate({"shard": {"windows": "test"}})


def report_of(store, data, ingested=INGESTED) -> NightlyReport:
    """The report of a night whose ingest gave these figures."""
    stages = night._Stages()
    stages.run("ingest", lambda: dict(ingested), lambda f: f"{sum(f['rows_read'].values()):,} rows")
    stages.run(
        "forecast", lambda: forecast(store, ForecastOptions(windows="test")), lambda f: f"{f['rows']} rows"
    )
    return build_report(store, data, stages.figures["forecast"]["forecast"], stages)


def rows_of(store) -> pl.DataFrame:
    """The published rows."""
    rows = pl.read_parquet(f"{store.root}/forecasts/*/*.parquet")
    return rows.with_columns(
        pl.col("entity", "metric", "fallback").cast(pl.String), pl.col("time").dt.cast_time_unit("us")
    )


def test_every_frame_has_the_columns_that_the_page_needs(serve, values):
    report = report_of(*serve(values))
    for name, columns in COLUMNS.items():
        assert set(columns) <= set(getattr(report, name).columns), name


def test_the_total_is_that_of_the_published_rows_and_begins_where_the_history_ends(serve, values):
    store, data = serve(values)
    report = report_of(store, data)
    summed = rows_of(store).group_by("metric", "time").agg(pl.col("mean").cast(pl.Float64).sum())
    both = report.total_forecast.join(summed, on=["metric", "time"], suffix="_summed")
    assert len(both) == len(report.total_forecast) == len(data.metrics) * data.horizon
    np.testing.assert_allclose(both["mean"], both["mean_summed"], rtol=1e-6)

    history = report.total_history.filter(pl.col("metric") == "request_rate").sort("time")
    assert history["time"].to_list() == [END - QUARTER * i for i in range(12, 0, -1)]
    np.testing.assert_allclose(history["value"], values[-12:, :, 2].sum(1, dtype=np.float64), rtol=1e-5)
    assert report.total_forecast["time"].min() == END == report.issued


def test_the_peaks_are_the_highest_of_the_published_rows(serve, values):
    store, data = serve(values)
    report = report_of(store, data)
    rows = rows_of(store).sort("q95", descending=True, maintain_order=True)
    for metric in data.metrics:
        highest = rows.filter(metric=metric).group_by("entity", maintain_order=True).first()
        shown = report.peaks.filter(metric=metric)
        assert shown["q95"].is_sorted(descending=True)
        both = shown.join(highest, on="entity", suffix="_published")
        assert len(both) == len(shown) == len(highest) == data.entities
        np.testing.assert_allclose(both["q95"], both["q95_published"], rtol=1e-6)
        np.testing.assert_allclose(both["mean"], both["mean_published"], rtol=1e-6)
        assert both["time"].to_list() == both["time_published"].to_list()


def test_an_entity_s_forecast_and_history_are_its_published_rows_and_telemetry(serve, values):
    values[-4:-2, 3, 0] = np.nan
    store, data = serve(values)
    report = report_of(store, data)
    key = {"entity": "e3", "metric": "cpu"}
    shown, published = (
        frame.filter(**key).sort("time") for frame in (report.entity_forecast, rows_of(store))
    )
    assert shown["time"].to_list() == published["time"].to_list()
    for name in ("mean", *(quantile_name(q) for q in QUANTILES)):
        np.testing.assert_allclose(shown[name], published[name], rtol=1e-6)
    history = report.entity_history.filter(**key).sort("time")["value"]
    assert history.null_count() == 2
    np.testing.assert_allclose(history.fill_null(np.nan).to_numpy(), values[-12:, 3, 0], rtol=1e-5)


def test_the_ladder_holds_the_model_and_the_naive_rungs_of_its_evaluation(serve, values):
    store, data = serve(values, rung=LAST_VALUE)
    report = report_of(store, data)
    assert report.model == "stgnn", "also where the naive forecast is the one that is served"
    assert [rung for rung, _ in report.ladder] == ["stgnn", LAST_VALUE, YESTERDAY, DAILY_MAXIMUM]
    folder = store.read_json("models/selected.json")["model"]
    errors = store.read_json(f"{folder}/metrics.json")["summary"]["test_error"]
    for rung, scores in report.ladder:
        assert float(np.mean(scaled_mae(scores.pooled()))) == pytest.approx(errors[rung])


def test_what_was_lost_is_counted_by_reason(serve, values):
    values[-8:, 1] = np.nan
    report = report_of(*serve(values))
    assert report.rejected.rows() == [
        ("machine_usage", "time is not a number", 3),
        ("machine_usage", "cpu is not a number", 4),
    ]
    assert report.fallbacks.rows() == [("less than 25% of the look-back is observed", 1)]
    summary = dict(report.summary)
    assert summary["rows read"] == 1005
    assert summary["rows rejected"] == 7
    assert summary["values made null"] == 7
    assert summary["entities with the naive forecast"] == 1
    assert summary["forecast rows"] == 5 * 3 * 4


@pytest.mark.parametrize("ingested", [INGESTED, NOTHING_LOST])
def test_the_page_can_be_drawn(serve, values, ingested):
    store, data = serve(values)
    page = render(report_of(store, data, ingested))
    assert "e3" in page
    assert "stgnn" in page
    assert ("time is not a number" in page) == (ingested is INGESTED)


# -- the night ---------------------------------------------------------------------------------------------


@pytest.fixture
def staged(monkeypatch) -> None:
    """Ingest, shard and train have nothing to do."""
    sharded = {"entities": 5, "shards": 2, "windows": {}, "skipped": True}
    trained = {"epochs": 1, "test_error": {}, "coverage": {}, "skipped": True, "peak_bytes": 10 << 40}
    monkeypatch.setattr(night, "load", lambda *_: {**INGESTED, "skipped": False, "peak_bytes": 9 << 30})
    monkeypatch.setattr(night, "shard", lambda *_: dict(sharded))
    monkeypatch.setattr(night, "train_model", lambda *_: dict(trained))


def fails(*_) -> dict:
    """A stage that does."""
    raise ValueError("the loss is nan")


def test_a_night_prints_its_tables_writes_its_report_and_returns_its_figures(serve, values, staged, capsys):
    store, _ = serve(values)
    figures = nightly(store, "raw", OPTIONS)
    status = {name: stage["status"] for name, stage in figures["stages"].items()}
    assert status == {"ingest": "done", "shard": "skipped", "train": "skipped", "forecast": "done"}
    assert figures["report"] == f"{store.uri}/reports/issued=20180103T021500Z/index.html"
    assert store.read_bytes("reports/issued=20180103T021500Z/index.html").startswith(b"<!doctype html>")
    assert figures["rows_read"] == INGESTED["rows_read"]
    printed = capsys.readouterr().out
    for words in (
        "rows read",
        "1,005",
        "cpu is not a number",
        "same time yesterday",
        "coverage_90",
        "skipped",
    ):
        assert words in printed


def test_the_memory_of_a_stage_is_that_of_its_largest_process_tonight(serve, values, staged, capsys):
    store, _ = serve(values)
    nightly(store, "raw", OPTIONS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    peak = {
        line[0]: float(line[3].replace(",", ""))
        for line in lines
        if len(line) > 3 and line[1] in ("done", "skipped")
    }
    assert peak["ingest"] == 9 << 10
    assert 0 < peak["train"] < 9 << 10, "not that of the run that trained"


@pytest.mark.parametrize(
    ("retrain", "kept"), [("3d", True), ("49h", True), ("2d", False), (0, False)], ids=str
)
def test_a_model_is_kept_until_there_is_so_much_telemetry_that_it_has_not_seen(
    serve, values, staged, retrain, kept, capsys
):
    store, data = serve(values)
    folder = store.read_json(SELECTED)["model"]
    described = store.read_json(f"{folder}/{MANIFEST}")
    assert described["end"] == data.start + data.step * data.steps
    store.write_json(f"{folder}/{MANIFEST}", described | {"end": described["end"] - 2 * 86_400})
    options = NightlyOptions.model_validate({"shard": {"windows": "test"}, "retrain": retrain})
    figures = nightly(store, "raw", options)
    note = figures["stages"]["train"]["note"]
    assert ("is kept: 2 days old, below --retrain" in note) == kept
    assert note in capsys.readouterr().out
    assert bool(figures["test_error"]) == kept, "those of the model that forecasts"
    assert len(rows_of(store)) == 5 * 3 * 4


def test_where_the_selected_model_does_not_fit_the_windows_one_is_trained(serve, values, staged, monkeypatch):
    store, _ = serve(values)
    folder = store.read_json(SELECTED)["model"]
    described = store.read_json(f"{folder}/{MANIFEST}")
    store.write_json(f"{folder}/{MANIFEST}", described | {"step": 60})

    def train(*_) -> dict:
        store.write_json(f"{folder}/{MANIFEST}", described)
        return {"epochs": 7, "test_error": {}, "coverage": {}}

    monkeypatch.setattr(night, "train_model", train)
    options = NightlyOptions.model_validate({"shard": {"windows": "test"}, "retrain": "3d"})
    assert nightly(store, "raw", options)["stages"]["train"]["note"] == "7 epochs"


def test_a_night_has_windows_of_eight_weeks_where_nothing_else_is_said():
    assert NightlyOptions().shard.span == 8 * 7 * 86_400
    assert NightlyOptions.model_validate({"shard": {"step": "30min"}}).shard.span == 8 * 7 * 86_400
    assert NightlyOptions.model_validate({"shard": {"span": None}}).shard.span is None


def test_if_training_fails_the_model_selected_before_forecasts_and_the_failure_is_told(
    serve, values, staged, monkeypatch
):
    store, _ = serve(values)
    monkeypatch.setattr(night, "train_model", fails)
    with pytest.raises(RuntimeError, match=r"training failed \(the loss is nan\)"):
        nightly(store, "raw", OPTIONS)
    assert len(rows_of(store)) == 5 * 3 * 4
    assert store.list("reports", "index.html")


def test_if_training_fails_and_no_model_was_selected_nothing_is_published(serve, values, staged, monkeypatch):
    store, _ = serve(values)
    store.remove("models/selected.json")
    monkeypatch.setattr(night, "train_model", fails)
    with pytest.raises(ValueError, match="the loss is nan"):
        nightly(store, "raw", OPTIONS)
    assert store.list("forecasts") == store.list("reports") == []


def test_all_stages_work_on_the_windows_of_shard():
    train, forecast = OPTIONS.of_dataset()
    assert train.windows == forecast.windows == "test"
    with pytest.raises(ValidationError, match="windows 'other' differ from those of shard, 'test'"):
        NightlyOptions.model_validate({"shard": {"windows": "test"}, "train": {"windows": "other"}})
