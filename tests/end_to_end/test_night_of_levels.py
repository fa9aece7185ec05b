"""A night of several levels: each is forecast, compared with the level below, and reconciled with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from fleetcast import models
from fleetcast.errors import InputError
from fleetcast.forecasting.levels import LevelOptions, compare_levels
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.synthesize import synthesize
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.source import Forecasts
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.training.loop import Progress

pytestmark = pytest.mark.usefixtures("ray_cluster")

LEVELS = ("container", "service", "machine")
METRICS, HORIZON = ("cpu", "memory"), 4


@pytest.fixture(scope="module")
def options() -> NightlyOptions:
    return NightlyOptions.model_validate(
        {
            "levels": LEVELS,
            "shard": {"step": "1h", "history": "6h", "horizon": "4h", "group_size": 6, "border": 2,
                      "metrics": METRICS, "lags": ["1d"]},
            "train": {"batch_size": 8, "stgnn": {"hidden": 4}},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def night(ray_cluster: None, options: NightlyOptions, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("levels")
    given = SynthesizeOptions(machines=4, services=3, containers=8, days=5, sample_interval=300, seed=1)
    synthesize(given, Store(str(folder / "raw")))
    store = Store(str(folder / "store"))
    with pytest.MonkeyPatch.context() as patch:  # how well the models are trained does not matter here
        patch.setattr("fleetcast.training.run.fit", _untrained)
        return store, str(folder / "raw"), nightly(store, str(folder / "raw"), options)


def _untrained(store, manifest, options, geometry, digest):
    torch.manual_seed(0)
    weights = models.build("stgnn", {"hidden": 4}, geometry).state_dict()
    return Progress(epoch=1, best_epoch=0), weights, 1


def rows(store: Store, level: str, noun: str) -> pl.DataFrame:
    found = pl.read_parquet(f"{store.root}/levels/{level}/{noun}/*/*.parquet")
    return found.with_columns(pl.col("entity", "metric").cast(pl.String)).sort("entity", "metric", "time")


def test_every_level_has_a_forecast_of_the_same_times_in_a_store_of_its_own(night: tuple) -> None:
    store, _, figures = night
    times = {level: rows(store, level, "forecasts")["time"].unique().to_list() for level in LEVELS}
    assert len(times["machine"]) == HORIZON
    assert times["container"] == times["service"] == times["machine"]
    assert {level: figures["levels"][level]["entities"] for level in LEVELS} == {
        "container": 8, "service": 3, "machine": 4,
    }  # fmt: skip
    assert not Path(store.root, "forecasts").exists()


def test_the_reconciled_forecast_has_the_form_of_the_forecast(night: tuple) -> None:
    for level in LEVELS:
        own, reconciled = (rows(night[0], level, noun) for noun in ("forecasts", "reconciled"))
        keys = ["entity", "metric", "time", "model", "fallback"]
        assert own.select(keys).equals(reconciled.select(keys))
        assert own.schema == reconciled.schema
        quantiles = reconciled.select("q05", "q50", "q95").to_numpy()
        assert (np.diff(quantiles, axis=1) >= 0).all()


def test_totals_agree(night: tuple) -> None:
    """A service is the mean of its containers, up to what its samples in the look-back say otherwise."""
    store = night[0]
    entities = pl.read_parquet(f"{store.root}/entities/*.parquet").with_columns(
        pl.col("entity").cast(pl.String)
    )
    services = entities.filter(pl.col("kind") == "container").select(
        "entity", pl.col("service").cast(pl.String)
    )

    def apart(noun: str) -> float:
        of_containers = (
            rows(store, "container", noun)
            .join(services, on="entity")
            .group_by("service", "metric", "time")
            .agg(below=pl.col("mean").mean())
        )
        both = rows(store, "service", noun).join(
            of_containers, left_on=["entity", "metric", "time"], right_on=["service", "metric", "time"]
        )
        assert len(both) == 3 * len(METRICS) * HORIZON
        return float((both["mean"] - both["below"]).abs().max())

    assert apart("reconciled") < 1e-5 < apart("forecasts")


def test_a_second_run_does_nothing_again(night: tuple, options: NightlyOptions) -> None:
    store, raw, figures = night
    again = nightly(store, raw, options)
    assert again["comparison"] == figures["comparison"]
    assert {row["status"] for row in again["levels"]["machine"]["stages"].values()} == {"skipped"}
    assert again["stages"]["levels"]["status"] == "skipped"


def test_the_report_says_of_every_level_which_forecast_is_better(night: tuple) -> None:
    found = night[2]["comparison"]
    assert found["metrics"] == list(METRICS)
    assert len(found["verdicts"]) == len(LEVELS) * len(METRICS)
    page = Path(found["report"]).read_text()
    for level in LEVELS:
        for metric in METRICS:
            assert f"{level}, {metric}" in page
    report = Path(found["report"]).with_name("report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("| service, cpu")]
    assert len(table) == 1
    assert "3 of 3" in table[0]


def test_the_server_serves_either(night: tuple) -> None:
    place = f"{night[0].uri}/levels/machine"
    served = []
    for reconciled in (False, True):
        forecasts = Forecasts(ServeOptions(store=place, clock="trace", reconciled=reconciled))
        forecasts.refresh()
        assert forecasts.snapshot is not None, forecasts.reason
        served.append(forecasts.snapshot)
    assert served[0].entities == served[1].entities
    expected = rows(night[0], "machine", "reconciled")["mean"].to_numpy()
    assert served[1].values[..., 0].reshape(-1) == pytest.approx(expected)
    assert served[1].values[..., 0].reshape(-1) != pytest.approx(
        rows(night[0], "machine", "forecasts")["mean"]
    )


def test_levels_that_say_nothing_of_each_other_are_refused(night: tuple) -> None:
    with pytest.raises(InputError, match=r"levels service, machine: nothing to compare, expected container"):
        compare_levels(night[0], ("service", "machine"), LevelOptions())


def test_forecasts_of_other_times_are_refused(night: tuple) -> None:
    own = night[0].level("machine")
    place = f"{night[2]['levels']['machine']['forecast']}/{MANIFEST}"
    was = own.read_json(place)
    own.write_json(place, {**was, "figures": {**was["figures"], "issued": "2018-01-01T00:00:00Z"}})
    with pytest.raises(InputError, match=r"levels: forecasts were issued at .*, expected the same time"):
        compare_levels(night[0], LEVELS, LevelOptions())
    own.write_json(place, was)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"levels": ["machine", "machine"]}, "expected each once"),
        ({"levels": ["machine"], "shard": {"level": "service"}}, "neither shard.windows nor shard.level"),
        ({"levels": ["rack"]}, "container"),
    ],
)
def test_wrong_levels_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NightlyOptions.model_validate(wrong)
