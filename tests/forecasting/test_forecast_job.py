"""The forecast job: published whole or not at all, once, and again when what it depends on has changed."""

from __future__ import annotations

import threading
from pathlib import Path

import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.naive import LAST_VALUE
from fleetcast.forecasting import run
from fleetcast.forecasting.predict import ForecastOptions, predict
from fleetcast.forecasting.run import forecast
from fleetcast.store import Store

OPTIONS = ForecastOptions(windows="test")
FOLDER = "forecasts/issued=20180103T021500Z"  # 200 steps of 15 minutes after 2018-01-01 00:15
FILES = [f"{FOLDER}/{name}" for name in ("manifest.json", "overview.json", "part-00000.parquet")]
FILES.append(f"{FOLDER}/part-00001.parquet")


def published(store: Store) -> dict[str, bytes]:
    """Every file that a reader of forecasts sees."""
    return {name: store.read_bytes(name) for name in store.list("forecasts")}


@pytest.fixture
def predicted(monkeypatch) -> list[int]:
    """The groups that were forecast, in their order."""
    groups: list[int] = []

    def counted(store, data, shard, *rest):
        groups.append(shard.group)
        return predict(store, data, shard, *rest)

    monkeypatch.setattr(run, "predict", counted)
    return groups


def test_a_forecast_holds_all_entities_and_says_what_it_was_made_with(serve, values):
    values[-8:, 1] = float("nan")
    store, data = serve(values, width=100)
    figures = forecast(store, OPTIONS)
    reasons = {"less than 25% of the look-back is observed": 1}
    assert figures == {
        "issued": "2018-01-03T02:15:00Z",
        "forecast": FOLDER,
        "skipped": False,
        "entities": 5,
        "gone": 0,
        "cold_starts": 0,
        "rows": 5 * 3 * 4,
        "model": "stgnn",
        "fallbacks": reasons,
        "peak_bytes": 1,
    }
    assert sorted(published(store)) == FILES
    frame = pl.read_parquet(f"{store.root}/{FOLDER}/*.parquet")
    assert frame.select("entity", "metric", "time").unique().height == frame.height == 60
    assert frame["time"].min().isoformat() == "2018-01-03T02:15:00+00:00"
    manifest = store.read_json(f"{FOLDER}/manifest.json")
    assert manifest["model"] == store.read_json("models/selected.json")["model"]
    assert manifest["metrics"] == list(data.metrics)
    assert store.list("_work") == []


def test_the_total_of_the_overview_is_the_sum_of_the_published_rows(serve, values):
    store, data = serve(values)
    forecast(store, OPTIONS)
    frame = pl.read_parquet(f"{store.root}/{FOLDER}/*.parquet").with_columns(pl.col("metric").cast(pl.String))
    total = store.read_json(f"{FOLDER}/overview.json")["total"]
    for metric in data.metrics:
        summed = frame.filter(metric=metric).group_by("time").agg(pl.col("mean").sum()).sort("time")["mean"]
        assert total[metric]["forecast"]["mean"] == pytest.approx(summed.to_list(), rel=1e-5)


def test_many_groups_share_files_and_the_forecast_is_the_same(serve, values, monkeypatch):
    store, _ = serve(values)
    forecast(store, OPTIONS)
    frame = pl.read_parquet(f"{store.root}/{FOLDER}/*.parquet")
    shown = store.read_json(f"{FOLDER}/overview.json")
    store.remove("forecasts")
    monkeypatch.setattr(run, "_MOST_FILES", 1)
    forecast(store, OPTIONS)
    assert store.list(FOLDER, ".parquet") == [f"{FOLDER}/part-00000.parquet"]
    names = [pl.col("entity", "metric", "model", "fallback").cast(pl.String)]
    again = pl.read_parquet(f"{store.root}/{FOLDER}/*.parquet")
    assert again.with_columns(names).equals(frame.with_columns(names))
    assert store.read_json(f"{FOLDER}/overview.json") == shown
    assert store.list("_work") == []


def test_a_second_run_does_nothing(serve, values, predicted):
    store, _ = serve(values)
    first = forecast(store, OPTIONS)
    before = published(store)
    second = forecast(store, OPTIONS)
    assert second == {**first, "skipped": True}
    assert published(store) == before
    assert predicted == [0, 1]


@pytest.mark.parametrize("change", ["rung", "options"])
def test_another_selection_or_option_replaces_the_forecast(serve, values, predicted, change):
    store, _ = serve(values)
    forecast(store, OPTIONS)
    before = published(store)
    options = OPTIONS
    if change == "rung":
        selected = store.read_json("models/selected.json")
        store.write_json("models/selected.json", {**selected, "rung": LAST_VALUE, "naive": LAST_VALUE})
    else:
        options = ForecastOptions(windows="test", min_history_share=1)
    assert forecast(store, options)["skipped"] is False
    assert predicted == [0, 1, 0, 1]
    after = published(store)
    assert sorted(after) == FILES
    assert after[FILES[0]] != before[FILES[0]]
    assert store.list("_work") == []
    if change == "rung":
        frame = pl.read_parquet(f"{store.root}/{FOLDER}/*.parquet")
        assert frame["model"].unique().to_list() == [LAST_VALUE]
        assert store.read_json(f"{FOLDER}/manifest.json")["figures"]["model"] == LAST_VALUE


def test_a_run_that_fails_while_it_publishes_shows_nothing_and_is_finished_by_the_next(
    serve, values, predicted, monkeypatch
):
    store, _ = serve(values)

    def full(self, staging, folder):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", full)
        with pytest.raises(OSError, match="no space"):
            forecast(store, OPTIONS)
    assert published(store) == {}
    assert forecast(store, OPTIONS)["skipped"] is False
    assert sorted(published(store)) == FILES
    assert predicted == [0, 1], "what was complete is not forecast again"


def test_an_interrupted_run_goes_on_with_the_groups_that_are_left(serve, values, predicted, monkeypatch):
    store, _ = serve(values)
    other, _ = serve(values)
    counted = run.predict

    def dies(store, data, shard, *rest):
        if shard.group == 1:
            raise KeyboardInterrupt
        return counted(store, data, shard, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run, "predict", dies)
        with pytest.raises(KeyboardInterrupt):
            forecast(store, OPTIONS)
    assert predicted == [0]
    assert published(store) == {}
    forecast(store, OPTIONS)
    assert predicted == [0, 1]

    forecast(other, OPTIONS)
    assert published(store) == published(other), "as if it had not been interrupted"


def test_without_a_selected_model_windows_or_a_store_the_error_says_what_to_run(serve, values, tmp_path):
    with pytest.raises(InputError, match=r"store\.json is missing.*run ingest first"):
        forecast(Store(str(tmp_path / "nothing")), OPTIONS)
    store, _ = serve(values)
    with pytest.raises(InputError, match=r"--windows other: no such dataset .*there: test"):
        forecast(store, ForecastOptions(windows="other"))
    store.remove("models/selected.json")
    with pytest.raises(
        InputError, match=r"no model is selected \(models/selected.json is missing\); run train"
    ):
        forecast(store, OPTIONS)
    assert published(store) == {}


def test_on_ray_a_reader_sees_the_whole_forecast_or_none(serve, values, monkeypatch, request):
    store, _ = serve(values)
    other, _ = serve(values)
    forecast(other, OPTIONS)
    monkeypatch.undo()
    request.getfixturevalue("ray_cluster")

    seen: set[tuple[str, ...]] = set()
    over = threading.Event()

    def read() -> None:
        root = Path(store.root)
        while not over.is_set():
            seen.add(tuple(sorted(str(path.relative_to(root)) for path in root.glob("forecasts/*/*"))))
            over.wait(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        forecast(store, OPTIONS)
    finally:
        over.wait(0.05)
        over.set()
        reader.join()
    assert seen == {(), tuple(FILES)}
    ours, theirs = published(store), published(other)
    assert {name: ours[name] for name in FILES[1:]} == {name: theirs[name] for name in FILES[1:]}
