"""One night, end to end on a small synthetic trace: what is published and what is reported."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.synthesize import synthesize
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions

pytestmark = pytest.mark.usefixtures("ray_cluster")

MACHINES, HORIZON, METRICS = 5, 4, ("cpu", "memory")


@pytest.fixture(scope="module")
def options() -> NightlyOptions:
    """An hour's steps, four hours ahead, three groups, one short epoch."""
    return NightlyOptions.model_validate(
        {
            "shard": {
                "step": "1h",
                "history": "4h",
                "horizon": "4h",
                "group_size": 2,
                "metrics": METRICS,
                "lags": ["1d"],
            },
            "train": {"epochs": 1, "batch_size": 4, "steps_per_epoch": 5, "stgnn": {"hidden": 4}},
        }
    )


@pytest.fixture(scope="module")
def night(ray_cluster: None, options: NightlyOptions, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The store, the raw files and the figures of a night."""
    folder = tmp_path_factory.mktemp("night")
    synthesize(SynthesizeOptions(machines=MACHINES, days=4, seed=1), Store(str(folder / "raw")))
    store = Store(str(folder / "store"))
    return store, str(folder / "raw"), nightly(store, str(folder / "raw"), options)


def forecasts(store: Store) -> pl.DataFrame:
    return pl.read_parquet(f"{store.root}/forecasts/*/*.parquet").with_columns(
        pl.col("entity", "metric", "model", "fallback").cast(pl.String)
    )


def test_every_machine_metric_and_step_is_forecast_once(night: tuple) -> None:
    table = forecasts(night[0])
    assert table.height == MACHINES * len(METRICS) * HORIZON
    assert table.unique(["entity", "metric", "time"]).height == table.height
    assert table["entity"].n_unique() == MACHINES


def test_forecasts_begin_where_the_telemetry_ends(night: tuple) -> None:
    store, _, figures = night
    telemetry = pl.read_parquet(f"{store.root}/telemetry/*/machine-*.parquet", columns=["time"])
    first = forecasts(store)["time"].min()
    assert first == telemetry["time"].max() + timedelta(seconds=IngestOptions().step)
    assert figures["forecast"] == f"forecasts/issued={first:%Y%m%dT%H%M%SZ}"


def test_quantiles_rise_and_stay_within_the_capacity(night: tuple) -> None:
    table = forecasts(night[0])
    values = table.select([quantile_name(q) for q in QUANTILES]).to_numpy()
    assert (values[:, 1:] >= values[:, :-1]).all()
    assert values.min() >= 0
    assert values.max() <= 1


def test_the_report_is_one_page_that_needs_nothing_else(night: tuple) -> None:
    page = Path(night[2]["report"]).read_text()
    assert "Cluster total" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_model_folder_says_where_it_comes_from(night: tuple) -> None:
    store = night[0]
    folder = store.read_json("models/selected.json")["model"]
    files = {name.rsplit("/", 1)[-1] for name in store.list(folder)}
    assert {"config.json", "weights.safetensors", "metrics.json", "manifest.json"} <= files
    manifest = store.read_json(f"{folder}/manifest.json")
    assert manifest["data"] == store.read_json("windows/default/manifest.json")["fingerprint"]
    assert manifest["options"]["seed"] == 0
    assert "torch" in manifest["versions"]


def test_the_figures_name_every_rung_and_the_coverage(night: tuple) -> None:
    figures = night[2]
    assert {"stgnn", "last value", "same time yesterday"} <= set(figures["test_error"])
    assert set(figures["coverage"]) == {"50%", "80%", "90%"}
    json.dumps(figures, allow_nan=False)


def test_a_second_night_with_nothing_new_is_skipped_whole(night: tuple, options: NightlyOptions) -> None:
    store, raw, _ = night
    before = forecasts(store)
    again = nightly(store, raw, options)
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert forecasts(store).equals(before)


def test_nothing_is_left_in_the_work_folder(night: tuple) -> None:
    assert night[0].list("_work") == []
